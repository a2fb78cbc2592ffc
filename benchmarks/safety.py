"""Cost of fault tolerance: asynchronous checkpoints, and recovery after a worker is killed.

Checkpoints: one rank trains as in step.py, in rounds of steps without a checkpoint, with one written in the background
as training does it, and with one that training waits for. Wall time on as many cores as torch has threads, so that a
thread that writes takes its time from training; a round lasts until its checkpoint is whole, on the disk, and older
ones are gone. Recovery: a worker of a run of the quickstart gets SIGKILL, and the time of each phase is read from the
run's own record; it has no target, since most of it is the start of processes, which depends on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import Check, conclude, interleave, ratio, wall_seconds
from step import build, configure, make_batches, one_rank, worker_engine, worker_loop

from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.writer import CheckpointWriter
from mowe_ray.training.loop import StepResult
from mowe_ray.training.protocols import Ranks

_PATIENCE_S = 300.0
_KILLED_AFTER = 6  # steps of the run, the first of which have a checkpoint
_RUN = (
    "compute.num_workers=2",
    "training.epochs=1000",
    "training.log_every=1",
    "training.save_every=4",
)


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps in a round, to each checkpoint (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (%(default)s)")
    parser.add_argument("--clips", type=int, default=4, help="clips in a batch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the longest clip (%(default)s)")
    parser.add_argument("--width", type=int, default=192, help="width of base encoder and language model (%(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="layers of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, and cores (%(default)s)")
    parser.add_argument("--storage", type=Path, help="folder on the disk to write to (the temporary one)")
    parser.add_argument("--skip-recovery", action="store_true", help="kill no worker (saves about a minute)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_", dir=arguments.storage) as storage:
        # First: its processes would inherit the cores and the rank of the other measurement.
        recovered = {} if arguments.skip_recovery else recovery(Path(storage))
        times, training = checkpoints(arguments, storage)
    step_s = {name: statistics.median(values) / arguments.steps for name, values in times.items()}
    table = {name: f"{seconds:7.4f} s a step" for name, seconds in step_s.items()}
    table["background, training stands still"] = f"{statistics.median(training.standstills):7.4f} s a checkpoint"
    table |= {f"recovery, {name}": f"{seconds:7.2f} s" for name, seconds in recovered.items()}
    check = Check(f"step, a checkpoint in {arguments.steps} / none", ratio(times["background"], times["none"]), 1.05)
    return conclude(
        "safety",
        table,
        [check],
        synchronous_ratio=round(ratio(times["synchronous"], times["none"]), 4),
        checkpoint_bytes=training.checkpoint_bytes,
        step_s=step_s,
        recovery_s=recovered,
    )


@dataclass
class Training:
    """A training in rounds of so many steps.

    Attributes:
        standstills: Seconds that training waited for each checkpoint written in the background.
    """

    engine: DeepSpeedEngine
    loop: Iterator[StepResult]
    writer: CheckpointWriter
    steps: int
    step: int = 0
    checkpoint_bytes: int = 0
    standstills: list[float] = field(default_factory=list)

    def none(self) -> None:
        """Train without a checkpoint."""
        for result in itertools.islice(self.loop, self.steps):
            self.step = result.step

    def background(self) -> None:
        """Start a checkpoint and train meanwhile."""
        self.standstills.append(wall_seconds(self._save))
        self.none()
        self.writer.wait(_PATIENCE_S, insist=True)

    def synchronous(self) -> None:
        """Write a checkpoint, then train."""
        self._save()
        self.writer.wait(_PATIENCE_S, insist=True)
        self.none()

    def _save(self) -> None:
        slices = self.engine.snapshot()
        self.checkpoint_bytes = sum(tensor_slice.data.nbytes for tensor_slice in slices.values())
        self.writer.save(self.step, slices, {})


def checkpoints(arguments: argparse.Namespace, storage: str) -> tuple[dict[str, list[float]], Training]:
    """Return the wall seconds of each round."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    config = configure(arguments.width, arguments.layers)
    model, processor = build(config)
    batches = make_batches(processor, arguments.clips, arguments.seconds)
    with one_rank():
        engine = worker_engine(model, config, config.compute.zero_stage)
        writer = CheckpointWriter(
            RunFolder(storage, "checkpoints"),
            Ranks(0, 1, engine.gather, engine.all_reduce, lambda line: print(line, file=sys.stderr)),
            keep=config.training.keep_checkpoints,
        )
        training = Training(engine, worker_loop(engine, itertools.cycle(batches), config.seed), writer, arguments.steps)
        rounds = {"none": training.none, "background": training.background, "synchronous": training.synchronous}
        for run in rounds.values():  # warm up
            run()
        training.standstills.clear()
        times = interleave({name: lambda run=run: wall_seconds(run) for name, run in rounds.items()}, arguments.rounds)
    return times, training


def recovery(storage: Path) -> dict[str, float]:
    """Kill a worker of a run; returns the seconds of each phase from the last step before to the first batch after.

    `from outside` is the time from the kill until the record of the recovery can be read.
    """
    metrics = storage / "killed" / "metrics.jsonl"
    with _running(["--config", "quickstart", f"storage={storage}", "name=killed", *_RUN], storage / "said") as command:
        _until(command, lambda: any(r["step"] >= _KILLED_AFTER for r in _records(metrics, "train")), storage / "said")
        worker = next(p for p in command.children(recursive=True) if _title(p).startswith("ray::RayTrainWorker"))
        worker.kill()
        began = time.perf_counter()
        _until(command, lambda: _records(metrics, "recovery"), storage / "said")
        outside = time.perf_counter() - began
        record = _records(metrics, "recovery")[0]
    return {name: record[name] for name in ("detection", "restart", "load", "data", "seconds")} | {
        "from outside": outside
    }


@contextmanager
def _running(arguments: list[str], said: Path) -> Iterator[psutil.Popen]:
    """Run the training command, and end it and all that it started."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}  # a Ray of its own
    with said.open("w") as out:
        process = psutil.Popen(
            [sys.executable, "-m", "mowe_ray.train", *arguments], env=environment, stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        if process.is_running():
            started = [process, *process.children(recursive=True)]
            process.terminate()
            for left in psutil.wait_procs(started, timeout=60)[1]:
                left.kill()
            psutil.wait_procs(started, timeout=60)


def _until(command: psutil.Popen, true: Callable[[], Any], said: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not true():
        if command.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run did not get so far:\n{said.read_text()}")
        time.sleep(0.05)


def _records(metrics: Path, kind: str) -> list[dict[str, Any]]:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


if __name__ == "__main__":
    sys.exit(main())
