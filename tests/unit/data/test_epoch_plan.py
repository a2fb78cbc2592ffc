from collections import Counter

import numpy as np
import pytest

from mowe_ray.data.epoch_plan import EpochPlan, plan_epoch
from mowe_ray.data.runs import RUN_BYTES, runs_of

LIMITS = {"lanes": 4, "batch_seconds": 60.0, "max_batch_size": 12, "shuffle_buffer": 500}


def corpus(count: int, sources: int = 1, shards: int = 10, seed: int = 0):
    rng = np.random.default_rng(seed)
    durations = rng.uniform(0.2, 30.0, count).astype(np.float32)
    shard = np.sort(rng.integers(0, shards, count)).astype(np.int32)
    return durations, shard, (shard * sources // shards).astype(np.int32)


def planned(data, weights=(1.0,), seed=0, epoch=0, done=None, **limits) -> EpochPlan:
    durations, shards, sources = data
    runs = runs_of(shards, sources)
    return plan_epoch(durations, runs, weights, seed=seed, epoch=epoch, done=done, **{**LIMITS, **limits})


def steps(*arguments, **named):
    return [[batch.tolist() for batch in step] for step in planned(*arguments, **named)]


def counts(plan) -> Counter:
    return Counter(row for step in plan for batch in step for row in batch)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 17, 100, 1003])
@pytest.mark.parametrize("lanes", [1, 2, 4, 7])
@pytest.mark.parametrize("group_by_length", [True, False])
def test_every_sample_once_in_steps_of_equal_width_within_the_limits(count, lanes, group_by_length):
    data = corpus(count, shards=3)
    plan = steps(data, lanes=lanes, group_by_length=group_by_length)
    assert counts(plan) == Counter(range(count))
    for step in plan:
        assert len(step) == lanes
        for batch in step:
            padded = len(batch) * data[0][batch].max(initial=0.0)
            assert len(batch) <= 12
            assert padded <= 60.0 or len(batch) == 1
            if count >= 2 * lanes:
                assert batch


@pytest.mark.parametrize("seed", range(5))
def test_random_limits_keep_the_contract(seed):
    rng = np.random.default_rng(seed)
    data = corpus(int(rng.integers(50, 400)), sources=3, seed=seed)
    weights = rng.uniform(0, 3, 3).tolist()
    limits = {
        "lanes": int(rng.integers(1, 9)),
        "batch_seconds": float(rng.uniform(5, 100)),
        "max_batch_size": int(rng.integers(1, 20)),
        "shuffle_buffer": int(rng.integers(1, 300)),
        "group_by_length": bool(rng.integers(2)),
    }
    plan = steps(data, weights, seed=seed, **limits)
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(data[2] == source)
        seen = [counts(plan)[row] for row in rows.tolist()]
        assert sum(seen) == int(weight) * len(rows) + round(weight % 1 * len(rows))
        assert set(seen) <= {int(weight), int(weight) + 1}
    for step in plan:
        assert len(step) == limits["lanes"]
        for batch in step:
            assert len(batch) <= limits["max_batch_size"]
            padded = len(batch) * data[0][batch].max(initial=0.0)
            assert padded <= limits["batch_seconds"] or len(batch) == 1


def test_the_plan_is_a_function_of_seed_and_epoch():
    data = corpus(500)
    assert steps(data, seed=1, epoch=2) == steps(data, seed=1, epoch=2)
    assert steps(data, seed=1, epoch=2) != steps(data, seed=1, epoch=3)
    assert steps(data, seed=1, epoch=2) != steps(data, seed=2, epoch=2)


def test_a_broken_pass_covers_the_source_over_the_epochs():
    data = corpus(400)
    halves = [set(counts(steps(data, [0.5], epoch=epoch))) for epoch in range(2)]
    assert len(halves[0]) == len(halves[1]) == 200
    assert halves[0] | halves[1] == set(range(400))
    assert counts(steps(data, [2.5])).total() == 1000


def test_a_weight_of_zero_leaves_the_source_out():
    data = corpus(300, sources=2)
    assert set(counts(steps(data, [1.0, 0.0]))) == set(np.flatnonzero(data[2] == 0).tolist())


def test_sources_are_mixed_in_proportion_all_the_way():
    data = corpus(2000, sources=2)
    plan = steps(data, [1.0, 3.0])
    quarter = len(plan) // 4
    shares = []
    for start in range(0, 4 * quarter, quarter):
        rows = [row for step in plan[start : start + quarter] for batch in step for row in batch]
        shares.append(np.mean(data[2][rows]))
    total = counts(plan)
    expected = sum(n for row, n in total.items() if data[2][row] == 1) / total.total()
    np.testing.assert_allclose(shares, expected, atol=0.1)


def test_a_label_sorted_corpus_is_mixed_within_steps():
    count = 8000
    labels = np.arange(count) * 4 // count
    durations = np.full(count, 3.0, np.float32)
    plan = steps((durations, np.zeros(count, np.int32), np.zeros(count, np.int32)), shuffle_buffer=500)
    for step in plan[:-1]:
        shares = np.bincount(labels[np.concatenate(step)], minlength=4) / sum(map(len, step))
        assert shares.max() < 0.7
    assert np.mean([len(set(labels[np.concatenate(step)])) for step in plan]) > 3.9


def test_clips_of_a_batch_are_of_like_length():
    data = corpus(5000)
    plan = steps(data, shuffle_buffer=5000)
    padded = sum(len(b) * data[0][b].max() for step in plan for b in step)
    assert data[0].sum() / padded > 0.85


def test_resume_by_skipping_steps_is_the_rest_of_the_plan():
    data = corpus(600)
    whole = steps(data)
    for start in (0, 1, 7, len(whole)):
        rest = [[batch.tolist() for batch in step] for step in planned(data).steps(start)]
        assert rest == whole[start:]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.5, 0.7)])
def test_resume_with_other_lanes_trains_exactly_what_is_left(weights):
    data = corpus(600, sources=2)
    before = counts(steps(data, weights)[:9])
    done = np.zeros(600, np.uint8)
    for row, times in before.items():
        done[row] = times
    after = counts(steps(data, weights, done=done, lanes=3))
    assert before + after == counts(steps(data, weights))


@pytest.mark.parametrize("seed", range(20))
def test_any_interruption_leaves_the_rest_of_what_the_weights_say(seed):
    rng = np.random.default_rng(seed)
    data = corpus(int(rng.integers(10, 300)), sources=3, seed=seed)
    weights = rng.choice([0.3, 0.5, 1.0, 1.7, 2.0, 2.5, 3.1], 3).tolist()
    whole = counts(steps(data, weights, epoch=seed))
    done = np.zeros(len(data[0]), np.int64)
    while done.sum() < whole.total():
        limits = {"lanes": int(rng.integers(1, 6)), "shuffle_buffer": int(rng.integers(1, 200))}
        rest = steps(data, weights, epoch=seed, done=done, **limits)
        plan = planned(data, weights, epoch=seed, done=done, **limits)
        assert counts(rest).total() == plan.samples == whole.total() - done.sum()
        for row, times in counts(rest[: rng.integers(1, len(rest) + 1)]).items():
            done[row] += times
    assert {row: times for row, times in enumerate(done.tolist()) if times} == whole
    assert steps(data, weights, epoch=seed, done=done) == []


@pytest.mark.parametrize("weights", [(2.5, 0.7), (1.0, 3.0), (0.5, 0.25)])
def test_the_rest_is_mixed_in_proportion_all_the_way(weights):
    data = corpus(4000, sources=2)
    plan = steps(data, weights)
    done = np.zeros(4000, np.int32)
    for row, times in counts(plan[: len(plan) // 3]).items():
        done[row] = times
    rest = steps(data, weights, done=done, lanes=3)
    total = counts(plan)
    expected = sum(n for row, n in total.items() if data[2][row] == 1) / total.total()
    quarter = len(rest) // 4
    for start in range(0, 4 * quarter, quarter):
        rows = [row for step in rest[start : start + quarter] for batch in step for row in batch]
        assert np.mean(data[2][rows]) == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("growth", [-37, 0, 60])
def test_extra_turns_that_were_had_count_when_the_source_has_grown_or_shrunk(growth):
    data = corpus(200)
    plan = steps(data, [1.4], epoch=3)
    done = np.zeros(200, np.int32)
    for row, times in counts(plan[: len(plan) // 2]).items():
        done[row] = times
    size = 200 + growth
    done = np.append(done, np.zeros(60, np.int32))[:size]
    extra_turns = max(round(0.4 * size), int((done > 1).sum()))
    after = counts(steps(corpus(size), [1.4], epoch=3, done=done))
    total = done + np.array([after[row] for row in range(size)])
    assert set(total.tolist()) == {1, 2}
    assert (total == 2).sum() == extra_turns


def test_text_only_samples_count_by_number():
    zeros = np.zeros(100, np.int32)
    plan = steps((np.zeros(100, np.float32), zeros, zeros))
    assert counts(plan) == Counter(range(100))
    assert max(len(batch) for step in plan for batch in step) == 12


def test_nothing_to_train_is_no_step():
    empty = np.zeros(0, np.int32)
    assert steps((empty.astype(np.float32), empty, empty)) == []


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.5, 0.7)])
def test_sizes_and_counts_are_known_without_looking_at_the_steps_before(weights):
    data = corpus(900, sources=2, shards=12)
    done = np.random.default_rng(1).integers(0, 2, 900).astype(np.int32)
    for left in (None, done):
        plan = planned(data, weights, done=left, shuffle_buffer=64)
        whole = [[batch.tolist() for batch in step] for step in plan]
        assert [step.samples for step in plan] == [sum(map(len, step)) for step in whole]
        for stop in (0, 1, len(whole) // 2, len(whole) - 1, len(whole), len(whole) + 3):
            expected = counts(whole[:stop])
            assert plan.counts_before(stop).tolist() == [expected[row] for row in range(900)]
            assert plan.samples_before(stop) == expected.total()


def test_a_lane_does_not_depend_on_which_others_are_looked_at():
    whole = steps(corpus(700), shuffle_buffer=64)
    assert [step[2].tolist() for step in planned(corpus(700), shuffle_buffer=64)] == [step[2] for step in whole]
    backwards = [[step[lane].tolist() for lane in (3, 1, 0, 2)] for step in planned(corpus(700), shuffle_buffer=64)]
    assert backwards == [[step[lane] for lane in (3, 1, 0, 2)] for step in whole]
    odd = [[rows.tolist() for rows in step[1::2]] for step in planned(corpus(700), shuffle_buffer=64)]
    assert odd == [step[1::2] for step in whole]


def test_micro_batches_are_full_and_no_lane_waits_for_another():
    data = corpus(20_000)
    plan = steps(data, lanes=8, shuffle_buffer=6400)
    padded = [len(batch) * data[0][batch].max(initial=0.0) for step in plan for batch in step]
    assert np.mean(padded) > 0.8 * 60


def test_a_lane_has_few_runs_open_at_a_time():
    durations, *_ = corpus(20_000)
    shards = np.arange(20_000) // 500
    plan = steps((durations, shards, np.zeros_like(shards)), lanes=2, shuffle_buffer=1280)  # 64 runs of 20
    lane = [step[0] for step in plan]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, batch in enumerate(lane):
        for run in {row // 20 for row in batch}:
            first.setdefault(run, number)
            last[run] = number
    held = [sum(first[run] <= n <= last[run] for run in first) for n in range(0, len(lane), 10)]
    assert 32 <= max(held) <= 64


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_about_8_mb_of_one_shard(seed):
    rng = np.random.default_rng(seed)
    shard = np.sort(rng.integers(0, 6, 400))
    sizes = rng.integers(0, 2, 400) * rng.integers(1, 1_500_000, 400)
    durations = rng.uniform(1, 20, 400).astype(np.float32)
    runs = runs_of(shard, shard // 3, sizes, durations)
    assert (runs.starts[0], runs.starts[-1]) == (0, 400)
    held = np.where(sizes > 0, sizes, (durations * 24_000).astype(int))
    for start, stop, source in zip(runs.starts[:-1], runs.starts[1:], runs.sources, strict=True):
        assert len(set(shard[start:stop])) == 1
        assert source == shard[start] // 3
        assert held[start : stop - 1].sum() <= RUN_BYTES
        if stop < 400 and shard[stop] == shard[start]:
            assert held[start : stop + 1].sum() > RUN_BYTES - 1_500_000
    parts = runs.cut(7)
    assert set(runs.starts) <= set(parts.starts)
    assert parts.lengths.max() <= 7
    assert parts.sizes(2) == np.bincount(shard // 3, minlength=2).tolist() == runs.sizes(2)


def test_micro_batches_mix_tasks_that_differ_in_length_only_without_groups():
    """Short clips are of one task, long ones of another: a step of like lengths would see one task alone."""
    rng = np.random.default_rng(0)
    is_long = rng.permutation(np.arange(960) % 2 == 1)
    data = (
        np.where(is_long, rng.uniform(1.0, 1.4, 960), rng.uniform(0.4, 0.8, 960)),
        np.zeros(960, int),
        np.zeros(960, int),
    )
    limits = {"lanes": 1, "max_batch_size": 12, "batch_seconds": 60.0}
    grouped, mixed = (
        np.array([is_long[batch].mean() for (batch,) in steps(data, group_by_length=grouped, **limits)])
        for grouped in (True, False)
    )
    assert {len(grouped), len(mixed)} <= {80, 81, 82}  # each of the plan's rounds may end with a smaller one
    assert np.isin(grouped, (0.0, 1.0)).mean() > 0.95
    # Shares of 12 independent draws have a variance of 1 / 48.
    assert mixed.var() == pytest.approx(1 / 48, rel=0.4)
    assert mixed.mean() == pytest.approx(0.5, abs=0.03)
