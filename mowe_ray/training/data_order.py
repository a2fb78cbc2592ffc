"""Which rows each rank trains on, step after step: the epoch plans, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

EpochPlan = Callable[[int], Iterator[list[np.ndarray]]]
"""Steps of an epoch by its number; a step is one array of rows per lane."""


def count_steps(plan: EpochPlan, epochs: int) -> int:
    """Return the optimizer steps of the first `epochs` epochs, by walking their plans."""
    return sum(1 for epoch in range(epochs) for _ in plan(epoch))


def rows_of_rank(
    plan: EpochPlan, *, start_step: int, total_steps: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """Yield the row numbers of each micro-batch of a rank, for the steps in start_step..total_steps.

    A step has a fixed number of lanes, whoever computes them: rank r takes lanes r, r + W, ...
    So the global batch does not depend on the number W of ranks.
    """
    step = 0
    for epoch in count():
        for lanes in plan(epoch):
            if step == total_steps:
                return
            if step >= start_step:
                yield from lanes[rank::world_size]
            step += 1
