"""Seconds of audio that a decoding process reads and decodes in a second: from S3 at 30 ms a request, and from a disk.

The server has a process of its own. Both take the same micro-batches of an epoch, in tasks of 16, as training does.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
from gets_per_clip import PER_TASK, decode, make_corpora
from measuring import Check, conclude, interleave, ratio

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.index import Index
from mowe_ray.data.shards.kept_runs import forget_runs
from mowe_ray.training.sampler import EpochSampler
from tests.s3_server import make_bucket, served


def main() -> int:
    """Measure and print; returns 0 if the targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=2400, help="of 10 s (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    parser.add_argument("--latency", type=float, default=0.03, help="of each request, in seconds (%(default)s)")
    arguments = parser.parse_args()
    cpu: dict[str, list[float]] = {"local": [], "S3, by runs": [], "S3, clip by clip": []}
    with tempfile.TemporaryDirectory() as folder, served(arguments.latency) as environment:
        os.environ.update(environment)
        make_bucket()
        local, remote = make_corpora(Path(folder), arguments.clips)
        runs = {
            name: partial(speed, local if name == "local" else remote, name == "S3, by runs", cpu[name]) for name in cpu
        }
        speeds = interleave(runs, arguments.rounds)
    table = {
        name: f"{np.median(speeds[name]):.0f} audio-s/s, {1000 * np.median(cpu[name]):.2f} CPU ms an audio second"
        for name in cpu
    }
    others = ratio(speeds["S3, clip by clip"], speeds["local"])
    table["S3, clip by clip / local"] = f"{others:.3f}"
    fast = Check("audio-s/s, S3 by runs / local", ratio(speeds["S3, by runs"], speeds["local"]), 0.9, at_most=False)
    return conclude("scale/s3_speed", table, [fast], clips=arguments.clips, rounds=speeds)


def speed(index: Index, whole: bool, cpu: list[float]) -> float:
    """Decode an epoch; returns seconds of audio a second, and adds CPU seconds an audio second to `cpu`."""
    forget_runs("benchmark")
    sampler = EpochSampler(index, DataSection(train=[{"path": "made"}]), seed=0, micro_batches_per_step=1, epochs=1)
    rows = [part for planned in sampler for part in planned.micro_batches]
    starts = sampler.runs.starts if whole else None
    samples, began, began_cpu = 0, time.perf_counter(), time.process_time()
    tasks = [rows[first : first + PER_TASK] for first in range(0, len(rows), PER_TASK)]
    for task, then in zip(tasks, [*tasks[1:], []], strict=True):
        samples += sum(len(batch.audio) for batch in decode(index, starts, "benchmark", task, then))
    seconds = samples / 16_000
    cpu.append((time.process_time() - began_cpu) / seconds)
    forget_runs("benchmark")
    return seconds / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
