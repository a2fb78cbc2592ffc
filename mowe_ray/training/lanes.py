"""Who computes what of a step: a fixed number of lanes, a micro-batch each, dealt out to the ranks there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from mowe_ray.data.plan import Rows
from mowe_ray.training.batch import Batch
from mowe_ray.training.data_order import PlannedStep


def rows_of_rank(lanes: list[Rows], rank: int, world_size: int) -> list[Rows]:
    """Return the micro-batches of a rank: lanes r, r + W, ... of W ranks, equally many on every one.

    Where W does not divide the lanes, the missing ones are empty.
    """
    rows = lanes[rank::world_size]
    return rows + [np.zeros(0, np.int64)] * (-(-len(lanes) // world_size) - len(rows))


def with_batches(
    order: Iterable[PlannedStep],
    load: Callable[[Iterator[Rows]], Iterator[Batch]],
    rank: int,
    world_size: int,
    change: Callable[[list[Rows]], list[Rows]] = lambda lanes: lanes,
) -> Iterator[tuple[PlannedStep, list[Batch]]]:
    """Yield the steps to come, each with this rank's micro-batches.

    Args:
        load: Turns rows into micro-batches, one each and in order; it may run ahead, in another thread.
        change: Returns the micro-batches that are run for the planned ones of a step, the same on every rank.
    """
    ahead: deque[tuple[PlannedStep, list[Rows]]] = deque()
    steps = iter(order)

    def rows() -> Iterator[Rows]:
        for planned in steps:
            mine = rows_of_rank(change(planned.lanes), rank, world_size)
            ahead.append((planned, mine))
            yield from mine

    batches = load(rows())
    for first in batches:
        planned, mine = ahead.popleft()
        step = [first, *islice(batches, len(mine) - 1)]
        assert [len(batch.ids) + len(batch.bad) for batch in step] == list(map(len, mine))
        yield planned, step
