from functools import partial

import numpy as np
import pytest

from mowe_ray.data.plan import plan_epoch
from mowe_ray.training.data_order import count_steps, rows_of_rank
from mowe_ray.training.sources import sample_rows

LANES = 6


@pytest.fixture
def plan():
    durations = np.random.default_rng(0).uniform(0.5, 4, 101)
    zeros = np.zeros(101, np.int32)
    return lambda epoch: plan_epoch(
        durations,
        zeros,
        zeros,
        [1.0],
        seed=3,
        epoch=epoch,
        lanes=LANES,
        batch_seconds=12,
        max_batch_size=4,
        shuffle_buffer=50,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_out_the_lanes_of_every_step(plan, world_size):
    total = count_steps(plan, 2)
    of_rank = partial(rows_of_rank, plan, start_step=0, total_steps=total, world_size=world_size)
    ranks = [list(of_rank(rank=rank)) for rank in range(world_size)]
    steps = [lanes for epoch in range(2) for lanes in plan(epoch)]
    each = LANES // world_size
    assert {len(rows) for rows in ranks} == {total * each}
    for step, lanes in enumerate(steps):
        shared = [ranks[lane % world_size][step * each + lane // world_size] for lane in range(LANES)]
        assert [rows.tolist() for rows in shared] == [rows.tolist() for rows in lanes]


def test_two_epochs_hold_every_sample_twice_in_another_order(plan):
    total = count_steps(plan, 2)
    assert total == 2 * count_steps(plan, 1)
    rows = [*rows_of_rank(plan, start_step=0, total_steps=total, rank=0, world_size=1)]
    counts = np.bincount(np.concatenate(rows))
    assert counts.tolist() == [2] * 101
    half = len(rows) // 2
    assert np.concatenate(rows[:half]).tolist() != np.concatenate(rows[half:]).tolist()


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_resumed_run_goes_on_where_it_stopped(plan, start):
    of_rank = partial(rows_of_rank, plan, total_steps=12, rank=1, world_size=2)
    whole, rest = list(of_rank(start_step=0)), list(of_rank(start_step=start))
    assert [r.tolist() for r in rest] == [r.tolist() for r in whole[start * LANES // 2 :]]


def test_sample_rows_are_spread_over_all_rows():
    assert list(sample_rows(3, 10)) == [0, 1, 2]
    assert list(sample_rows(101, 3)) == [0, 50, 100]
    assert list(sample_rows(0, 3)) == []
