"""How often each sample was trained on, as ranges within the shards: short, and valid when others come or go.

A ledger is JSON: `{shard path: [[first, last_exclusive, times], ...]}`, in positions of the usable samples of
the shard. What it does not name was not trained on.
"""

import numpy as np
import numpy.typing as npt

from mowe_ray.data.index import Index

Ledger = dict[str, list[list[int]]]
Counts = npt.NDArray[np.int32]


def write_ledger(counts: Counts, index: Index) -> Ledger:
    """Return (N,) counts of the samples of `index` as ranges."""
    order, shard_starts, names = _by_shard(index)
    times = counts[order]
    first_of_range = np.ones(len(times), bool)
    first_of_range[1:] = times[1:] != times[:-1]
    first_of_range[shard_starts[:-1][np.diff(shard_starts) > 0]] = True
    starts = np.flatnonzero(first_of_range)
    ends = np.append(starts[1:], len(times))
    trained = times[starts] > 0
    starts, ends = starts[trained], ends[trained]
    shard = np.searchsorted(shard_starts, starts, side="right") - 1
    ranges = np.stack([starts - shard_starts[shard], ends - shard_starts[shard], times[starts]], axis=1)
    ledger: Ledger = {}
    for number, entry in zip(shard.tolist(), ranges.tolist(), strict=True):
        ledger.setdefault(names[number], []).append(entry)
    return ledger


def read_ledger(ledger: Ledger, index: Index) -> Counts:
    """Return (N,) counts of the samples of `index`; shards it does not have are passed over."""
    order, shard_starts, names = _by_shard(index)
    steps = np.zeros(len(order) + 1, np.int64)  # up at the first of a range, down after its last
    for number, name in enumerate(names):
        if name in ledger:
            first, last, times = np.asarray(ledger[name], np.int64).reshape(-1, 3).T
            low, high = shard_starts[number : number + 2]
            np.add.at(steps, np.minimum(low + first, high), times)
            np.subtract.at(steps, np.minimum(low + last, high), times)
    counts = np.zeros(len(order), np.int32)
    counts[order] = np.cumsum(steps)[:-1]
    return counts


def _by_shard(index: Index) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[str]]:
    """Return the samples shard after shard, where the S shards start (S + 1 places), and their paths.

    A shard of two sources is one here, the samples of the second source after those of the first.
    """
    names, number = np.unique(np.asarray(index.shard_names, np.str_), return_inverse=True)
    shard = number[index.shards]
    sizes = np.bincount(shard, minlength=len(names))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return np.argsort(shard, kind="stable"), starts, names.tolist()
