"""Indexes without files behind them, to plan on."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mowe_ray.data.index import Index


def made_index(shards: Sequence[tuple[str, str, int]], seed: int = 0) -> Index:
    """Make an index of shards (source, path, usable samples); the shards of a source must be neighbours.

    Ids number the samples of a shard, and lengths (0.5 to 5 s) depend on the path, so that a shard holds the same
    samples in whichever index it is.
    """
    sources = list(dict.fromkeys(source for source, _, _ in shards))
    ids, durations, source_codes, shard_codes = [], [], [], []
    for number, (source, path, size) in enumerate(shards):
        ids += [f"{path}/{n}" for n in range(size)]
        lengths = np.random.default_rng([seed, *path.encode()]).uniform(0.5, 5.0, size)
        durations += lengths.tolist()
        source_codes += [sources.index(source)] * size
        shard_codes += [number] * size
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "duration_s": pa.array(durations, pa.float32()),
            "source": pa.DictionaryArray.from_arrays(pa.array(source_codes, pa.int32()), pa.array(sources)),
            "shard": pa.DictionaryArray.from_arrays(
                pa.array(shard_codes, pa.int32()), pa.array([path for _, path, _ in shards], pa.string())
            ),
        }
    )
    return Index(table, sources, [])
