import math
from collections.abc import Iterator
from queue import Queue
from threading import Thread

import numpy as np
import pytest

from mowe_ray.config import load_config
from mowe_ray.data.index import Index
from mowe_ray.data.sample import BadSample
from mowe_ray.training.collate import Batch
from mowe_ray.training.sampler import rows_of_rank, with_batches
from tests.made_index import made_index
from tests.unit.training.test_sampler import SHARDS, make_order, plain


def test_lanes_are_the_micro_batches_of_all_workers():
    assert (
        load_config(
            "quickstart", ["compute.num_workers=[1,3]", "training.gradient_accumulation=2"]
        ).micro_batches_per_step
        == 6
    )


@pytest.mark.parametrize(
    ("micro_batches", "world_size"), [(6, 1), (6, 2), (6, 3), (6, 4), (6, 5), (5, 2), (4, 4), (3, 7)]
)
def test_ranks_share_out_the_micro_batches_of_every_step(micro_batches, world_size):
    for planned in make_order(micro_batches_per_step=micro_batches):
        ranks = [rows_of_rank(planned.micro_batches, rank, world_size) for rank in range(world_size)]
        assert {len(mine) for mine in ranks} == {math.ceil(micro_batches / world_size)}
        dealt = [ranks[lane % world_size][lane // world_size].tolist() for lane in range(micro_batches)]
        assert dealt == [rows.tolist() for rows in planned.micro_batches]
        assert sum(len(rows) for mine in ranks for rows in mine) == planned.samples
        assert all(rows.dtype == np.int64 for mine in ranks for rows in mine)


def batch_of(index: Index, rows: np.ndarray) -> Batch:
    """What decoding the rows would give: the longest of several is bad."""
    ids = index.table["id"].take(rows).to_pylist()
    bad = [BadSample(name, "a", "silent") for name in ids[1:2]]
    return Batch({}, 0, 0, 0.0, 0.0, ids[:1] + ids[2:], [], [], [], [], bad)


def loaded_ahead(index: Index, rows: Iterator[np.ndarray]) -> Iterator[Batch]:
    """Load in another thread, as far ahead as it gets."""
    queue: Queue = Queue()

    def fill() -> None:
        for lane in rows:
            queue.put(batch_of(index, lane))
        queue.put(None)

    Thread(target=fill, daemon=True).start()
    return iter(queue.get, None)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_step_comes_with_its_own_batches(world_size):
    index, order = made_index(SHARDS), make_order()
    ranks = [
        list(with_batches(order, lambda rows: loaded_ahead(index, rows), rank, world_size))
        for rank in range(world_size)
    ]
    for planned, *steps in zip(order, *ranks, strict=True):
        assert all(plain(p) == plain(planned) for p, _ in steps)
        wanted = sorted(np.concatenate(planned.micro_batches).tolist())
        batches = [batch for _, mine in steps for batch in mine]
        names = [n for b in batches for n in b.ids] + [bad.id for b in batches for bad in b.bad]
        assert sorted(names) == sorted(index.table["id"].take(wanted).to_pylist())


def test_a_stream_that_lost_a_micro_batch_is_noticed():
    index = made_index(SHARDS)

    def lossy(rows: Iterator[np.ndarray]) -> Iterator[Batch]:
        return (batch_of(index, lane) for n, lane in enumerate(rows) if n != 8)

    with pytest.raises(AssertionError):
        list(with_batches(make_order(), lossy, 0, 1))
