"""Decoded audio that a rank holds ahead by default, at any `batch_seconds`, and what it costs to hold no more.

Less ahead is shorter executions of Ray Data, each of which has to start. What a start costs is measured, in CPU time of
all processes, over micro-batches of next to nothing; what decoding costs between two starts, over clips of 10 s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import mowe_ray.distributed  # noqa: F401  # isort: skip  (first: it sets what Ray reads while it is imported)
import numpy as np
import psutil
import ray
from data import make_index
from measuring import Check, conclude, cpu_seconds

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.distributed import cluster
from mowe_ray.distributed.ray_data.pipeline import AUDIO_BYTES_PER_S, decode_stream, per_execution

BATCH_SECONDS = (30.0, 120.0, 600.0, 3600.0)


def main() -> int:
    """Measure and print; returns 0 if the targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=12, help="executions that are started (%(default)s)")
    parser.add_argument("--clips", type=int, default=120, help="of 10 s that are decoded (%(default)s)")
    arguments = parser.parse_args()
    gb = float(DataSection.model_fields["lookahead_gb"].default)
    held = {seconds: per_execution(gb, seconds) for seconds in BATCH_SECONDS}
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as folder:
        index = make_index(Path(folder), arguments.clips)
        rows = index.take(np.arange(len(index)))
        decode_s = cpu_seconds(lambda: load_micro_batch(rows, 0.1, 30.0)) / float(index.durations.sum())
        cluster.join(1)
        stored = ray.put(index)
        empty = [np.zeros(0, np.int64)] * 2 * arguments.starts
        stream(stored, empty, 2)  # starts Ray's processes
        many, one = (stream(stored, empty, size) for size in (2, len(empty)))
        ray.shutdown()
    start_s = (many - one) / (arguments.starts - 1)
    share = start_s / (start_s + decode_s * held[120.0] * 120.0)
    table = {
        f"batch_seconds={seconds:g}": f"{2 * count * seconds * AUDIO_BYTES_PER_S / 1e9:.2f} GB, two times {count} "
        "micro-batches"
        for seconds, count in held.items()
    }
    table |= {"an execution's start, CPU s": f"{start_s:.2f}", "decoding 1,000 s, CPU s": f"{1000 * decode_s:.2f}"}
    worst = max(2 * count * seconds * AUDIO_BYTES_PER_S / 1e9 for seconds, count in held.items())
    checks = [
        Check("share of CPU that starts cost (batch_seconds=120)", share, 0.05),
        Check("GB of audio held ahead, at most", worst, 1.2),
    ]
    return conclude("scale/lookahead", table, checks)


def stream(stored: ray.ObjectRef, rows: Sequence[np.ndarray], size: int) -> float:
    """Run micro-batches in executions of this size; returns CPU seconds of all processes."""
    before = cpu_of_all()
    found = decode_stream(stored, rows, min_duration_s=0.1, max_duration_s=30.0, decode_cpus=1, per_execution=size)
    assert sum(1 for _ in found) == len(rows)
    return cpu_of_all() - before


def cpu_of_all() -> float:
    """Return the CPU seconds so far of this process and of all that it has started."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [me, *me.children(recursive=True)])


if __name__ == "__main__":
    sys.exit(main())
