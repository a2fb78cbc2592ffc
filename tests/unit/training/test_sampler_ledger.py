import json
from itertools import pairwise

import numpy as np
import pytest

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.training.ledger import read_ledger, write_ledger
from tests.made_index import made_index


def random_shards(rng: np.random.Generator) -> list[tuple[str, str, int]]:
    """Some shards of two sources, in no order of their names, some without usable samples."""
    paths = [f"/data/{n}.tar" for n in rng.permutation(40)[: rng.integers(1, 20)]]
    split = int(rng.integers(0, len(paths) + 1))
    return [("a" if n < split else "b", path, int(rng.integers(0, 12))) for n, path in enumerate(paths)]


def by_brute_force(counts, index) -> dict:
    """Times of every trained sample by (shard, position)."""
    seen: dict[str, int] = {}
    times = {}
    for row, shard in enumerate(index.table["shard"].to_pylist()):
        position = seen[shard] = seen.get(shard, -1) + 1
        if counts[row]:
            times[shard, position] = int(counts[row])
    return times


@pytest.mark.parametrize("seed", range(40))
def test_ledgers_hold_the_counts_of_random_indexes(seed):
    rng = np.random.default_rng(seed)
    index = made_index(random_shards(rng))
    counts = np.repeat(rng.integers(0, 3, len(index)), rng.integers(1, 6, len(index)))[: len(index)].astype(np.int32)
    ledger = json.loads(json.dumps(write_ledger(counts, index)))
    np.testing.assert_array_equal(read_ledger(ledger, index), counts)
    ranges = [(path, *entry) for path, entries in ledger.items() for entry in entries]
    unrolled = {(path, n): times for path, first, last, times in ranges for n in range(first, last)}
    assert unrolled == by_brute_force(counts, index)
    assert sum(last - first for _, first, last, _ in ranges) == len(unrolled), "no range overlaps another"
    joinable = [1 for a, b in pairwise(ranges) if (a[0], a[2], a[3]) == (b[0], b[1], b[3])]
    assert joinable == []


@pytest.mark.parametrize("seed", range(20))
def test_other_shards_keep_the_counts_of_those_that_stayed(seed):
    rng = np.random.default_rng(seed)
    shards = random_shards(rng)
    old = made_index(shards)
    counts = rng.integers(0, 4, len(old)).astype(np.int32)
    kept = [shard for shard in shards if rng.random() < 0.6]
    new = made_index([*kept, ("b", "/data/new.tar", 5)])
    times = dict(zip(old.table["id"].to_pylist(), counts.tolist(), strict=True))
    expected = [times.get(name, 0) for name in new.table["id"].to_pylist()]
    assert read_ledger(write_ledger(counts, old), new).tolist() == expected


def test_a_shard_of_two_sources_counts_for_each():
    index = made_index([("a", "x", 3), ("a", "y", 2), ("b", "x", 3)])
    counts = np.array([1, 1, 0, 0, 2, 0, 3, 3], np.int32)
    assert write_ledger(counts, index) == {"x": [[0, 2, 1], [4, 6, 3]], "y": [[1, 2, 2]]}
    assert read_ledger(write_ledger(counts, index), index).tolist() == counts.tolist()


def test_a_shard_that_has_shrunk_keeps_what_it_still_has():
    ledger = {"x": [[1, 4, 2], [6, 8, 1]], "y": [[0, 2, 1]]}
    assert read_ledger(ledger, made_index([("a", "x", 3), ("a", "y", 3)])).tolist() == [0, 2, 2, 1, 1, 0]


def test_nothing_has_an_empty_ledger():
    index = made_index([("a", "x", 3)])
    assert write_ledger(np.zeros(3, np.int32), index) == {}
    assert read_ledger({}, index).tolist() == [0, 0, 0]
    nothing = made_index([])
    assert write_ledger(np.zeros(0, np.int32), nothing) == {}
    assert read_ledger({"x": [[0, 2, 1]]}, nothing).tolist() == []


def test_real_shards_are_named_by_their_paths(make_samples, tmp_path):
    write_webdataset(make_samples(12), str(tmp_path / "corpus"), shard_bytes=60_000)
    index = build_index([SourceSpec("made", str(tmp_path / "corpus"))], tmp_path, min_s=0.1, max_s=30)
    counts = np.arange(12, dtype=np.int32) // 5
    ledger = write_ledger(counts, index)
    shards = sorted(str(path) for path in (tmp_path / "corpus").glob("*.tar"))
    assert len(shards) > 2
    assert index.shard_names == shards
    assert set(ledger) <= set(shards)
    assert read_ledger(ledger, index).tolist() == counts.tolist()
