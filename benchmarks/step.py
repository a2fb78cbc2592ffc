"""A worker's training step against a bare torch loop: the overhead of the trainer.

One rank runs `training_steps` on DeepSpeed as a training worker does; the bare loop is forward, backward, clip, AdamW.
Both train a copy of one model (the quickstart's, widened to about 5 million weights) on the same batches, which hold
about 60 s of audio like the quickstart's. ZeRO copies every gradient and weight a few times per step, whatever its
batch: with 8 s in a step this alone would be a fifth of it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from measuring import Check, conclude, cpu_seconds, interleave, ratio

from mowe_ray.config import RunConfig, load_config
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine, deepspeed_config
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.tokenizing import train_tokenizer
from mowe_ray.training.build import assemble, optimizer_groups
from mowe_ray.training.collate import Batch, collate
from mowe_ray.training.loop import StepResult, training_steps


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each loop (%(default)s)")
    parser.add_argument("--clips", type=int, default=16, help="clips in a batch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the longest clip (%(default)s)")
    parser.add_argument("--width", type=int, default=192, help="width of base encoder and language model (%(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="layers of each (%(default)s)")
    parser.add_argument("--zero-stage", type=int, default=2, choices=range(4), help="of DeepSpeed (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = configure(arguments.width, arguments.layers)
    model, processor = build(config)
    batches = make_batches(processor, arguments.clips, arguments.seconds)
    with one_rank():
        engine = worker_engine(build(config)[0], config, arguments.zero_stage)
        ours = worker_loop(engine, itertools.cycle(batches), config.seed)
        bare = bare_loop(model, config, itertools.cycle(batches))
        loops: dict[str, Callable[[], object]] = {"worker": lambda: next(ours), "bare torch": lambda: next(bare)}
        for loop in loops.values():
            for _ in batches:
                loop()
        times = interleave({name: lambda loop=loop: cpu_seconds(loop) for name, loop in loops.items()}, arguments.steps)
    weights = sum(p.numel() for p in model.parameters())
    table = {name: f"{statistics.median(values):7.4f} CPU s a step" for name, values in times.items()}
    check = Check("step, worker / bare torch", ratio(times["worker"], times["bare torch"]), 1.10)
    return conclude("step", table, [check], weights=weights, zero_stage=arguments.zero_stage)


def configure(width: int, layers: int) -> RunConfig:
    """Return the quickstart's configuration with another size."""
    return load_config(
        "quickstart",
        [
            f"model.base_encoder.config.d_model={width}",
            f"model.base_encoder.config.encoder_layers={layers}",
            f"model.base_encoder.config.encoder_ffn_dim={4 * width}",
            f"model.language_model.config.hidden_size={width}",
            f"model.language_model.config.intermediate_size={4 * width}",
            f"model.language_model.config.num_hidden_layers={layers}",
        ],
    )


def build(config: RunConfig) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Build the model from its seed."""
    tokenizer = train_tokenizer(["what do you hear? a tone and some noise"], 1024)
    model, processor = assemble(
        config.model, config.training.mowe_loss, seed=config.seed, tokenizer=tokenizer, gpu=False
    )
    return model.train(), processor


def make_batches(processor: MoweProcessor, clips: int, seconds: float) -> list[Batch]:
    """Return four batches of clips of different lengths."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(4):
        lengths = [round(16_000 * seconds * share) for share in [1.0, *rng.uniform(0.6, 1.0, clips - 1)]]
        audio = rng.integers(-20_000, 20_000, sum(lengths), np.int16)
        texts = ["what do you hear?"] * clips, ["a tone and some noise"] * clips
        names = [[name] * clips for name in ("id", "ac", "benchmark")]
        ids, tasks, sources = names
        references = [[answer] for answer in texts[1]]
        micro_batch = MicroBatch(audio, lengths, [2.0**-15] * clips, ids, *texts, references, tasks, sources, [])
        batches.append(collate(micro_batch, processor))
    return batches


@contextmanager
def one_rank() -> Iterator[None]:
    """Make this process the only rank."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def worker_engine(model: MoweForConditionalGeneration, config: RunConfig, zero_stage: int) -> DeepSpeedEngine:
    """Return the engine of a training worker."""
    return DeepSpeedEngine(
        model,
        optimizer_groups(model, config.training),
        deepspeed_config(zero_stage=zero_stage, clip_norm=config.training.clip_norm, bf16=False, offload="none"),
    )


def worker_loop(engine: DeepSpeedEngine, batches: Iterator[Batch], seed: int) -> Iterator[StepResult]:
    """Train as a training worker does."""
    return training_steps(engine, ((number, 1.0, [batch]) for number, batch in enumerate(batches, 1)), seed=seed)


def bare_loop(model: MoweForConditionalGeneration, config: RunConfig, batches: Iterator[Batch]) -> Iterator[object]:
    """Train with nothing but torch."""
    groups = optimizer_groups(model, config.training)
    optimizer = torch.optim.AdamW(groups)
    parameters = [p for group in groups for p in group["params"]]
    for batch in batches:
        loss = model(**batch.inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    sys.exit(main())
