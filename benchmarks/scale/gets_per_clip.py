"""Requests a clip of an epoch that is read from a local S3 server, and bytes over those of the clips.

Two ranks with two lanes each; tasks of 16 micro-batches in two processes, which share what they keep as those of
training do. Once by runs, and once clip by clip.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import fsspec
import numpy as np
from data import make_index as make_local
from measuring import Check, conclude

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.index import Index, SourceSpec, build_index
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.data.runs import RUN_BYTES
from mowe_ray.data.shards.kept_runs import KeptRuns, forget_runs, with_runs
from mowe_ray.training.sampler import EpochSampler, rows_of_rank
from tests.s3_server import BUCKET, S3Server, make_bucket

RANKS, LANES, PER_TASK = 2, 4, 16
ROOM = 96 * RUN_BYTES  # of a lane


def main() -> int:
    """Measure and print; returns 0 if the targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1200, help="of 10 s (%(default)s)")
    arguments = parser.parse_args()
    with S3Server() as server, tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as folder:
        os.environ.update(server.environment)
        make_bucket()
        local, remote = make_corpora(Path(folder), arguments.clips)
        size = sum(local.table["audio_size"].to_pylist()) + sum(local.table["meta_size"].to_pylist())
        found = {}
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            for name, whole in (("clip by clip", False), ("by runs", True)):
                requests, moved = server.faults.count("GET .*tar"), server.faults.bytes
                heard = [digest for rank in range(RANKS) for digest in pool.map(*work(remote, rank, whole))]
                gets = (server.faults.count("GET .*tar") - requests) / len(remote)
                found[name] = gets, (server.faults.bytes - moved) / size, heard
    for rank in range(RANKS):
        forget_runs(f"benchmark {rank}")
    table = {name: f"{gets:.3f} GETs a clip, {share:.2f} of the bytes" for name, (gets, share, _) in found.items()}
    heard, expected = found["by runs"][2], found["clip by clip"][2]
    checks = [
        Check("tasks with other samples, or other audio", sum(a != b for a, b in zip(heard, expected, strict=True)), 0),
        Check("bytes read over those of the clips", found["by runs"][1], 1.1),
        Check("GETs a clip", found["by runs"][0], 0.1),
    ]
    return conclude("scale/gets_per_clip", table, checks, clips=len(remote))


def make_corpora(folder: Path, clips: int) -> tuple[Index, Index]:
    """Make a corpus of 10 s clips on disk and in the bucket; returns both indexes."""
    make_local(folder, clips)
    paths = str(folder / f"corpus-{clips}"), f"s3://{BUCKET}/corpus"
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    for shard in sorted(Path(paths[0]).glob("*.tar")):
        fs.put_file(str(shard), f"{BUCKET}/corpus/{shard.name}")
    local, remote = (
        build_index([SourceSpec("made", path, "ac")], folder / "cache", min_s=0.1, max_s=30.0) for path in paths
    )
    return local, remote


def work(index: Index, rank: int, whole: bool) -> tuple[partial[str], list[list[np.ndarray]]]:
    """Return the function that decodes a task, and the tasks of a rank in an epoch."""
    sampler = EpochSampler(index, DataSection(train=[{"path": "made"}]), seed=0, micro_batches_per_step=LANES, epochs=1)
    rows = [part for planned in sampler for part in rows_of_rank(planned.micro_batches, rank, RANKS)]
    tasks = [rows[start : start + PER_TASK] for start in range(0, len(rows), PER_TASK)]
    starts = sampler.runs.starts if whole else None
    return partial(heard, index, starts, f"benchmark {rank}"), tasks


def heard(index: Index, starts: np.ndarray | None, key: str, task: Sequence[np.ndarray]) -> str:
    """Decode a task; returns a hash of all ids and audio in their order."""
    digest = hashlib.blake2b()
    for batch in decode(index, starts, key, task):
        assert not batch.bad
        digest.update(repr(batch.ids).encode() + batch.audio.tobytes())
    return digest.hexdigest()


def decode(
    index: Index, starts: np.ndarray | None, key: str, task: Sequence[np.ndarray], then: Sequence[np.ndarray] = ()
) -> list[MicroBatch]:
    """Read and decode the micro-batches of a task, by runs that begin at `starts`, or clip by clip.

    Args:
        then: Of the next task, whose runs are fetched meanwhile.
    """
    extents = [] if starts is None else index.extents(starts, [*task, *then])
    with KeptRuns(key, LANES // RANKS * ROOM, extents) as runs:
        return [with_runs(runs, load_micro_batch, index.take(rows), 0.1, 30.0) for rows in task]


if __name__ == "__main__":
    sys.exit(main())
