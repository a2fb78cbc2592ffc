"""The first run on a GPU: how much of it training uses, where the time goes, and whether memory is as estimated.

Trains the `paper` preset with random weights on noise, in one process without Ray, and measures the rate of a large
matrix product beside it. `--device cpu --tiny` runs the same code on a miniature model in less than a minute; its
figures say nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measuring import Check, conclude
from torch import nn

from mowe_ray.config import RunConfig, load_config
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine, build_engine
from mowe_ray.model.cost import KNOWN_ARCHITECTURES, zero_memory_bytes
from mowe_ray.model.tokenizing import train_tokenizer
from mowe_ray.training.build import model_dtype
from mowe_ray.training.collate import Batch, collate
from mowe_ray.training.estimate import estimate
from mowe_ray.training.fault_tolerance.watchdog import ActivityTracker
from mowe_ray.training.loop import StepResult, training_steps
from mowe_ray.training.useful_work import TrainingWork, Work

TEXT = "the speaker says that rain fell over the old town while a small dog barked at passing trains "


def main() -> int:
    """Measure and print; returns 0 if the targets are met, 1 if not, 2 without the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="measured steps (%(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the longest clip (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the quickstart preset's miniature model")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device (--device cpu --tiny tries the code without one)", file=sys.stderr)
        return 2
    config = configure(arguments.tiny, arguments.device)
    tokenizer = train_tokenizer([TEXT], 1024)
    with one_rank(arguments.device):
        processor, engine = build_engine(config, tokenizer, ActivityTracker(), lambda _line: None)
        made = [noise(config, arguments.seconds, seed) for seed in range(3)]
        return report(config, engine, made, processor, arguments.steps)


def configure(tiny: bool, device: str) -> RunConfig:
    """Return the preset with random weights in place of checkpoints, on one worker."""
    gpus = int(device == "cuda")
    overrides = ["compute.num_workers=1", f"compute.gpus_per_worker={gpus}", "training.gradient_accumulation=1"]
    if tiny:
        return load_config("quickstart", [*overrides, "data.batch_seconds=30", "data.max_batch_size=4"])
    config = load_config("paper", overrides).model_dump(mode="json")
    model = config["model"]
    for holder, key in [(model, "base_encoder"), (model, "language_model")] + [
        (weak, "checkpoint") for weak in model["weak_encoders"]
    ]:
        holder[key] = {"config": KNOWN_ARCHITECTURES[holder[key]]}
    return RunConfig.model_validate(config)


@contextmanager
def one_rank(device: str) -> Iterator[None]:
    """Make this process the only rank."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def noise(config: RunConfig, seconds: float, seed: int) -> MicroBatch:
    """Return a micro-batch of as many clips as the preset allows, of similar length, with 20 to 40 words each."""
    rng = np.random.default_rng(seed)
    clips = min(config.data.max_batch_size, int(config.data.batch_seconds / seconds))
    lengths = [round(16_000 * seconds * share) for share in [1.0, *rng.uniform(0.9, 1.0, clips - 1)]]
    words = TEXT.split()
    answers = [" ".join(words[n % len(words)] for n in range(count)) for count in rng.integers(20, 40, clips)]
    audio = rng.integers(-8000, 8000, sum(lengths), np.int16)
    names = [[name] * clips for name in ("id", "asr", "noise")]
    ids, tasks, sources = names
    references = [[answer] for answer in answers]
    instructions = ["what does the speaker say"] * clips
    return MicroBatch(audio, lengths, [2.0**-15] * clips, ids, instructions, answers, references, tasks, sources, [])


class Spans:
    """Seconds by part of the step; each begins and ends with the device idle, so all take longer than a plain step."""

    def __init__(self, engine: DeepSpeedEngine):
        self.seconds: Counter[str] = Counter()
        self._device, self._engine, self._hooks = engine.device, engine, list[Any]()
        tower = engine.model.audio_tower
        parts: dict[str, list[nn.Module]] = {
            "base encoder": [tower.base_encoder],
            "members": list(tower.pool or ()),
            "adapter": [tower.adapter],
            "language model": [engine.model.language_model],
        }
        for name, modules in parts.items():
            for module in modules:
                self._watch(name, module)
        for name in ("forward", "backward", "step"):
            setattr(engine, name, self._timed(name, getattr(engine, name)))

    def _watch(self, name: str, module: nn.Module) -> None:
        began: list[float] = []

        def enter(*_: Any) -> None:
            began.append(self._now())

        def leave(*_: Any) -> None:
            self._add(name, began.pop())

        self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def close(self) -> None:
        """Leave the engine as it was."""
        for hook in self._hooks:
            hook.remove()
        for name in ("forward", "backward", "step"):
            delattr(self._engine, name)

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = self._now()
            result = method(*arguments, **named)
            self._add(name, began)
            return result

        return timed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _add(self, name: str, began: float) -> None:
        self.seconds[name] += self._now() - began


def train(engine: DeepSpeedEngine, batches: Iterator[Batch], steps: int) -> list[StepResult]:
    """Train as a worker does; a batch is collated while the step waits for it, which a worker does ahead."""
    fed = ((number, 1.0, [batch]) for number, batch in zip(range(1, steps + 1), batches, strict=False))
    return list(training_steps(engine, fed, seed=0))


def seconds_by_part(engine: DeepSpeedEngine, batches: Iterator[Batch], steps: int) -> dict[str, float]:
    """Return seconds of a step, by part."""
    spans = Spans(engine)
    results = train(engine, batches, steps)
    spans.close()
    found = {name: seconds / steps for name, seconds in spans.seconds.items()}
    parts = ("base encoder", "members", "adapter", "language model")
    inside = sum(found.get(name, 0.0) for name in parts)
    return {
        "collation and copy": statistics.median(result.data_wait_s for result in results),
        **{name: found.get(name, 0.0) for name in parts},
        "front-ends, routing, loss": found["forward"] - inside,
        "backward": found["backward"],
        "optimizer": found["step"],
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """Return the floating-point operations a second of a large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(4 * 2 * size**3 / (time.perf_counter() - began))
    return max(rates[1:])


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has had, on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work_of_a_step(config: RunConfig, batches: list[Batch]) -> tuple[Work, int]:
    """Return the mean work of a step, without recomputed activations, and the estimated bytes of the model's states."""
    costs = estimate(config.model)
    assert costs.total.weights is not None
    assert costs.total.trainable is not None
    counted = TrainingWork(costs.model, max_s=config.data.max_duration_s)
    work = [counted.micro_batch(np.asarray(batch.clip_s), np.asarray(batch.row_tokens)) for batch in batches]
    frozen = int(costs.total.weights.total) - costs.total.trainable
    itemsize = model_dtype(config.model, config.compute.gpus_per_worker > 0).itemsize
    states = zero_memory_bytes(costs.total.trainable, frozen, config.compute.zero_stage, 1, itemsize)["total"]
    return sum(work, Work()), states


def report(config: RunConfig, engine: DeepSpeedEngine, made: list[MicroBatch], processor: Any, steps: int) -> int:
    """Measure, print, and return the exit code."""
    device, dtype = engine.device, engine.model.dtype
    batches = (collate(batch, processor) for batch in itertools.cycle(made))
    train(engine, batches, 2)  # kernels are chosen, states are made
    results = train(engine, batches, steps)
    peak = peak_memory_bytes(device)
    parts = seconds_by_part(engine, batches, max(2, steps // 3))
    collated = [collate(batch, processor) for batch in made]
    work, states = work_of_a_step(config, collated)
    step_s = statistics.median(result.step_s for result in results)
    per_step = work.executed * 1e9 / len(collated)
    rate = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 512)
    audio_s = statistics.mean(result.audio_s for result in results)
    table = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "matrix product": f"{rate / 1e12:.2f} TFLOP/s in {dtype}",
        "step": f"{step_s:.3f} s, {per_step / 1e12:.2f} TFLOP, useful share {work.useful_share:.3f}",
        "audio": f"{audio_s / step_s:.1f} audio-hours per hour",
        "peak memory": f"{peak / 2**30:.2f} GiB, of which states by the dry run {states / 2**30:.2f} GiB",
        **{f"  {name}": f"{seconds:.3f} s" for name, seconds in parts.items()},
    }
    checks = [
        Check("MFU against the matrix product", per_step / step_s / rate, 0.30, at_most=False),
        Check("estimated states / peak memory", states / peak, 1.0),
    ]
    return conclude("gpu", table, checks, seconds_by_part={name: round(value, 4) for name, value in parts.items()})


if __name__ == "__main__":
    sys.exit(main())
