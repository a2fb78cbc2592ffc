"""What an index of ten million clips costs: a micro-batch of it, a process that decodes, and a rank that resumes.

The index is made up. What a decoding process gets is what Ray hands over: small values copied, arrays shared. The rank
is one of 1,000, stopped in the middle of an epoch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import Check, conclude, cpu_seconds

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.index import Index
from mowe_ray.training.sampler import EpochSampler, rows_of_rank

_CHUNK = 1 << 16
_CLIPS_PER_SHARD = 5000
_CLIP_BYTES = 240_000

index: Index


def main() -> int:
    """Measure and print; returns 0 if the targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10_000_000, help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1000, help="(default: %(default)s)")
    arguments = parser.parse_args()
    global index
    index = made_index(arguments.clips)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        in_band, shared, held, ms = pool.apply(decoding_process)
    resumed, rows, took = resume(index, arguments.ranks)
    table = {
        "clips, shards": f"{arguments.clips:,}, {len(index.shard_names):,}",
        "copied to each process": f"{in_band / 2**20:.1f} MiB",
        "shared by the processes of a node": f"{shared / 2**20:.0f} MiB",
        "the rank resumes after step": f"{resumed.step:,}, with {rows} clips of its own in the next one",
    }
    checks = [
        Check("ms on the index per micro-batch of 12", ms, 2),
        Check("MiB a decoding process holds of its own", held / 2**20, 10),
        Check("seconds to resume in mid-epoch", took, 2),
    ]
    return conclude("scale/index_rows", table, checks)


def decoding_process() -> tuple[int, int, int, float]:
    """Receive the index; returns bytes copied, shared, and held by this process alone, and ms per micro-batch."""
    buffers: list[pickle.PickleBuffer] = []
    in_band = pickle.dumps(index, protocol=5, buffer_callback=buffers.append)
    before = private_bytes()
    received: Index = pickle.loads(in_band, buffers=buffers)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, len(index), 12) for _ in range(300)]
    received.take(batches[0])
    ms = 1000 / len(batches) * cpu_seconds(lambda: [received.take(rows) for rows in batches])
    return len(in_band), sum(buffer.raw().nbytes for buffer in buffers), private_bytes() - before, ms


def private_bytes() -> int:
    """Return the memory that only this process has."""
    return int(psutil.Process().memory_full_info().uss)


def made_index(clips: int) -> Index:
    """Make an index of clips of 1 to 30 s; chunks repeat the ids of the first, which nothing here compares."""
    rng = np.random.default_rng(0)
    ids = pa.array([f"speaker-{n % 977}/utterance-{n:08d}" for n in range(_CHUNK)])
    paths = pa.array([f"s3://bucket/corpus/train-{n:06d}.tar" for n in range(-(-clips // _CLIPS_PER_SHARD))])
    parts = []
    for start in range(0, clips, _CHUNK):
        row = np.arange(start, min(clips, start + _CHUNK))
        place = row % _CLIPS_PER_SHARD
        columns = {
            "id": ids.slice(0, len(row)),
            "duration_s": rng.uniform(1, 30, len(row)).astype(np.float32),
            "task": pa.array(["asr"] * len(row)),
            "audio_at": place * (_CLIP_BYTES + 2048),
            "audio_size": np.full(len(row), _CLIP_BYTES),
            "meta_at": place * (_CLIP_BYTES + 2048) + _CLIP_BYTES + 1024,
            "meta_size": np.full(len(row), 200),
            "row": place.astype(np.int32),
            "source": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(row), np.int32)), pa.array(["made"])),
            "shard": pa.DictionaryArray.from_arrays(pa.array((row // _CLIPS_PER_SHARD).astype(np.int32)), paths),
        }
        parts.append(pa.table(columns))
    index = Index(pa.concat_tables(parts), ["made"], [])
    # As published: computed once, in the driver. Their hashes would take a minute here, and are only compared.
    sizes = np.bincount(index.shards).tolist()
    vars(index)["shard_digests"] = {str(p): (n, f"{p}") for p, n in zip(index.shard_names, sizes, strict=True)}
    assert len(index.runs.starts) > 1
    return index


def resume(index: Index, ranks: int) -> tuple[EpochSampler, int, float]:
    """Resume a rank in mid-epoch; returns its sampler, its clips of the next step, and the seconds it took."""
    data = DataSection(train=[{"path": "made"}])
    make = partial(EpochSampler, index, data, seed=0, micro_batches_per_step=ranks, epochs=1)
    steps = len(index) // 12 // ranks // 2
    state = {"step": steps, "samples": 0, "warmup_samples": 0, "epoch": 0, "plan": make()._plan_key, "plan_step": steps}
    state |= {"before": {}, "absent": [], "shards": {p: list(d) for p, d in index.shard_digests.items()}}
    start = time.process_time()
    sampler = make(state=state)
    rows = rows_of_rank(next(iter(sampler)).micro_batches, ranks // 2, ranks)
    return sampler, sum(map(len, rows)), time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
