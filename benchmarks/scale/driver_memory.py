"""Memory that the driver of a run has to itself after it has opened an index of ten million clips, scanned before.

The scans are made up, and written as the first driver writes them; the second one, measured, is a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import pyarrow as pa
from measuring import Check, conclude

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.shards.record import ROW_SCHEMA

_CLIPS_PER_SHARD = 5000


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10_000_000, help="(default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as folder:
        for name, shards in (("all", -(-arguments.clips // _CLIPS_PER_SHARD)), ("one", 1)):
            Path(folder, name).mkdir()
            for number in range(shards):
                Path(folder, name, f"{number:06d}.tar").touch()
        with multiprocessing.get_context("spawn").Pool(1) as first:
            first.apply(opened, (folder,))
        with multiprocessing.get_context("spawn").Pool(1) as second:
            clips, mib = second.apply(opened, (folder,))
    table = {"clips, shards": f"{clips:,}, {clips // _CLIPS_PER_SHARD:,}", "bytes a clip": f"{mib * 2**20 / clips:.1f}"}
    return conclude("scale/driver_memory", table, [Check("MiB of the driver's own", mib, 60)])


def opened(folder: str) -> tuple[int, float]:
    """Open the index; returns its clips, and the MiB that it takes in this process alone."""
    for name in ("one", "all"):  # the first for what is imported, and starts, on the way
        before = own_bytes()
        index = build_index(
            [SourceSpec("made", f"{folder}/{name}")], f"{folder}/cache", min_s=0.1, max_s=40.0, run_map=scanned
        )
    pa.default_memory_pool().release_unused()
    return len(index), (own_bytes() - before) / 2**20


def own_bytes() -> int:
    """Return the memory of this process that is no part of a file, which the kernel could drop."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def scanned(_: object, shards: Iterable[str]) -> Iterator[pa.Table]:
    """Yield the rows of each shard, as a scan would."""
    row = np.arange(_CLIPS_PER_SHARD)
    for number, _ in enumerate(shards):
        columns = {
            "id": pa.array([f"speaker-{number}/utterance-{n:05d}" for n in row.tolist()]),
            "duration_s": np.random.default_rng(number).uniform(1, 30, len(row)).astype(np.float32),
            "task": pa.array(["asr"] * len(row)),
            "audio_at": row * 242_048,
            "audio_size": np.full(len(row), 240_000),
            "meta_at": row * 242_048 + 241_024,
            "meta_size": np.full(len(row), 200),
            "clips": np.ones(len(row), np.int32),
            "turns": np.ones(len(row), np.int32),
            "asks": np.ones(len(row), bool),
        }
        rest = {field.name: pa.nulls(len(row), field.type) for field in ROW_SCHEMA if field.name not in columns}
        table = pa.table({**columns, **rest}).select(ROW_SCHEMA.names)
        yield table.cast(ROW_SCHEMA)


if __name__ == "__main__":
    sys.exit(main())
