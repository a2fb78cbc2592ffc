import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.index import Index
from mowe_ray.data.profile import sample_rows
from mowe_ray.training.ledger import describe
from mowe_ray.training.optimizer import learning_rate_factor
from mowe_ray.training.sample_audit import audit_samples
from mowe_ray.training.sampler import EpochSampler, PlannedStep, rows_of_rank
from tests.made_index import made_index

SHARDS = [("a", "a0", 40), ("a", "a1", 33), ("b", "b0", 28)]


def section(weights=(1.0, 1.0), **limits) -> DataSection:
    limits = {"max_duration_s": 5, "batch_seconds": 12, "max_batch_size": 4, "shuffle_buffer": 50} | limits
    return DataSection(train=[{"path": "unused", "weight": weight} for weight in weights], **limits)


def make_order(index: Index | None = None, data: DataSection | None = None, **changes) -> EpochSampler:
    values: dict[str, Any] = {"seed": 3, "micro_batches_per_step": 6}
    values |= changes if "max_steps" in changes else {"epochs": 2} | changes
    return EpochSampler(index or made_index(SHARDS), data or section(), **values)


def plain(planned: PlannedStep) -> tuple:
    """A step as values that can be compared."""
    return (
        *(v for k, v in vars(planned).items() if k != "micro_batches"),
        [rows.tolist() for rows in planned.micro_batches],
    )


def train(order: EpochSampler, steps: int) -> list[PlannedStep]:
    """Train `steps` steps."""
    trained = []
    for planned in islice(order, steps):
        order.advance(planned)
        trained.append(planned)
    return trained


def saved(order: EpochSampler) -> dict:
    return json.loads(json.dumps(order.snapshot()()))


def samples_of(index: Index, planned: PlannedStep) -> list[list[str]]:
    rows = np.concatenate(planned.micro_batches)
    return [[row["source"], row["id"]] for row in index.table.take(rows).select(["source", "id"]).to_pylist()]


def test_epochs_hold_every_sample_once_in_another_order():
    steps = list(make_order())
    assert [planned.step for planned in steps] == list(range(1, len(steps) + 1))
    epochs = [[row for p in steps if p.epoch == epoch for rows in p.micro_batches for row in rows] for epoch in (0, 1)]
    assert [sorted(rows) for rows in epochs] == [list(range(101))] * 2
    assert epochs[0] != epochs[1]
    assert [planned.last for planned in steps] == [False] * (len(steps) - 1) + [True]
    done = np.cumsum([planned.samples for planned in steps])
    assert [planned.progress for planned in steps] == (done / 202).tolist()


def test_max_steps_ends_where_it_says_in_whichever_epoch():
    steps = list(make_order(max_steps=20))
    assert len(steps) == 20
    assert steps[-1].epoch > 1
    assert [planned.progress for planned in steps] == [n / 20 for n in range(1, 21)]
    assert [planned.last for planned in steps] == [False] * 19 + [True]
    assert [plain(p)[:2] for p in steps[:10]] == [plain(p)[:2] for p in islice(make_order(), 10)]


def test_iterating_ahead_moves_nothing():
    order = make_order()
    train(order, 2)
    before = saved(order)
    ahead = iter(order)
    assert [p.step for p in islice(ahead, 7)] == list(range(3, 10))
    assert saved(order) == before
    train(order, 1)
    assert next(ahead).step == 10, "who runs ahead keeps running"
    assert next(iter(order)).step == 4


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.5, 0.7)])
@pytest.mark.parametrize("length", [{"epochs": 2}, {"max_steps": 13}])
def test_a_resumed_run_trains_the_very_same_steps(weights, length):
    whole = [plain(planned) for planned in make_order(data=section(weights), warmup_steps=3, **length)]
    for stop in range(len(whole) + 1):
        order = make_order(data=section(weights), warmup_steps=3, **length)
        train(order, stop)
        resumed = make_order(data=section(weights), warmup_steps=3, state=saved(order), **length)
        assert (resumed.step, resumed.progress, resumed.epochs_finished) == (
            *(order.step, order.progress, order.epochs_finished),
        )
        assert saved(resumed) == saved(order)
        assert [plain(planned) for planned in resumed] == whole[stop:]


def test_a_resumed_run_can_be_longer():
    order = make_order(epochs=1)
    train(order, 1000)
    assert (order.progress, order.epochs_finished) == (1.0, 1)
    longer = make_order(epochs=2, state=saved(order))
    assert (longer.progress, longer.epochs_finished) == (0.5, 1)
    micro_batches = [plain(planned)[-1] for planned in make_order(epochs=2)]
    assert [plain(planned)[-1] for planned in longer] == micro_batches[order.step :]
    assert list(make_order(max_steps=order.step, state=saved(order))) == []
    assert list(make_order(epochs=1, state=saved(longer))) == []


@pytest.mark.parametrize(
    "changes", [{"micro_batches_per_step": 4}, {"max_batch_size": 3}, {"batch_seconds": 30}, {"shuffle_buffer": 20}]
)
def test_other_batches_train_the_rest_of_the_epoch(changes):
    order = make_order()
    before = train(order, 3)
    micro_batches = (
        {"micro_batches_per_step": changes["micro_batches_per_step"]} if "micro_batches_per_step" in changes else {}
    )
    data = section(**changes) if not micro_batches else section()
    resumed = make_order(data=data, state=saved(order), **micro_batches)
    rest = list(resumed)
    for epoch in (0, 1):
        trained = [row for p in before + rest if p.epoch == epoch for rows in p.micro_batches for row in rows]
        assert sorted(trained) == list(range(101))
    assert [p.step for p in rest] == list(range(4, 4 + len(rest)))
    assert rest[-1].progress == 1.0
    # The plan of the rest is a plan like any other: it too is resumed to the step.
    train(resumed, 2)
    again = make_order(data=data, state=saved(resumed), **micro_batches)
    assert [plain(planned) for planned in again] == [plain(planned) for planned in rest[2:]]


def test_shards_that_are_done_are_not_read_again_and_new_ones_are():
    old = made_index(SHARDS)
    order = make_order(old)
    before = [name for planned in train(order, 5) for _, name in samples_of(old, planned)]
    state = saved(order)
    state["trained"]["a0"] = [[0, 40, 1]]  # as if its samples had been among the first
    new = made_index([("a", "a0", 40), ("b", "b0", 28), ("b", "b1", 9)])
    resumed = make_order(new, state=state, micro_batches_per_step=2, load_ids=lambda _: old)
    rest = [planned for planned in resumed if planned.epoch == 0]
    names = [name for planned in rest for _, name in samples_of(new, planned)]
    left = {f"b0/{n}" for n in range(28)} - set(before) | {f"b1/{n}" for n in range(9)}
    assert sorted(names) == sorted(left), "nothing of a0, which is done, or a1, which is gone"


def interrupted_run(rng: np.random.Generator, index: Index, weights: list[float], epochs: int) -> Iterator[dict]:
    """Train to the end through crashes; yield the lines of a samples.jsonl that went back with each of them."""
    lines: list[dict] = []
    state: dict | None = None
    micro_batches, data = int(rng.integers(1, 9)), section(weights)
    while True:
        if rng.random() < 0.5:  # the same command again, or one with other settings
            micro_batches = int(rng.integers(1, 9))
            data = section(weights, max_batch_size=int(rng.integers(1, 6)), shuffle_buffer=int(rng.integers(1, 80)))
        order = make_order(index, data, seed=7, micro_batches_per_step=micro_batches, epochs=epochs, state=state)
        lines = lines[: order.step]
        world_size = int(rng.integers(1, micro_batches + 3))
        steps, ahead = iter(order), list[PlannedStep]()
        for _ in range(int(rng.geometric(0.05))):
            ahead += islice(steps, int(rng.integers(1, 20)))  # read ahead, and lost if the run crashes
            if not ahead:
                yield from lines
                return
            planned = ahead.pop(0)
            rows = np.concatenate(
                [r for rank in range(world_size) for r in rows_of_rank(planned.micro_batches, rank, world_size)]
            )
            lines.append({"step": planned.step, "epoch": planned.epoch, "samples": samples_of(index, planned)})
            assert Counter(index.table["id"].take(rows).to_pylist()) == Counter(i for _, i in lines[-1]["samples"])
            order.advance(planned)
            if rng.random() < 0.2:
                state = saved(order)


@pytest.mark.parametrize("seed", range(25))
def test_whatever_happens_every_sample_is_trained_as_often_as_its_weight_says(seed):
    rng = np.random.default_rng(seed)
    index = made_index([(source, f"{source}{n}", int(rng.integers(0, 30))) for source in "abc" for n in range(3)])
    weights = rng.choice([0.3, 0.5, 1.0, 1.0, 1.7, 2.0, 2.5], 3).tolist()
    lines = list(interrupted_run(rng, index, weights, epochs=2))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for epoch in (0, 1):
        counts = Counter(tuple(sample) for line in lines if line["epoch"] == epoch for sample in line["samples"])
        for source, weight in zip("abc", weights, strict=True):
            table = index.table.filter([name == source for name in index.table["source"].to_pylist()])
            times = [counts[source, name] for name in table["id"].to_pylist()]
            assert set(times) <= {int(weight), math.ceil(weight)}
            assert sum(times) == int(weight) * len(times) + round(weight % 1 * len(times))
    check = audit_samples(index, weights, map(json.dumps, lines), epochs=2)
    assert (check.lost, check.repeated, check.findings) == (0, 0, [])


@pytest.mark.parametrize("seed", range(10))
def test_shards_that_come_and_go_lose_and_repeat_nothing(seed):
    rng = np.random.default_rng(seed)
    shards = [("a", f"a{n}", int(rng.integers(1, 20))) for n in range(8)]
    present = [True] * 6 + [False] * 2
    counts: Counter[str] = Counter()
    state, finished = None, 0
    seen: dict[str, Index] = {}
    while not finished:
        index = made_index([shard for shard, here in zip(shards, present, strict=True) if here])
        seen[describe(index)["ids"]] = index
        order = make_order(
            index, section([1.0]), micro_batches_per_step=3, epochs=1, state=state, load_ids=seen.__getitem__
        )
        for planned in train(order, int(rng.integers(1, 6))):
            counts.update(name for _, name in samples_of(index, planned))
        state, finished = saved(order), order.epochs_finished
        present[int(rng.integers(0, 8))] ^= rng.random() < 0.5
    assert set(counts.values()) == {1}
    assert set(counts) >= set(index.table["id"].to_pylist())


def test_the_state_is_short():
    index = made_index([("a", f"a{n}", 2000) for n in range(10)])
    order = make_order(index, section([1.0], shuffle_buffer=2048), epochs=1, micro_batches_per_step=1)
    train(order, 3200)
    ranges = saved(order)["trained"]
    assert order.snapshot()()["samples"] > 8000
    assert sum(map(len, ranges.values())) < 1500, "runs of neighbours, and single ones of the 2048 being mixed"
    train(order, 10**6)
    assert saved(order)["trained"] == {f"a{n}": [[0, 2000, 1]] for n in range(10)}
    assert saved(order)["before"] == {}


# ---- learning rate ------------------------------------------------------------------------------


def by_steps(step: int, total: int, warmup: int, schedule: str) -> float:
    """The factor of a run whose steps are of one size."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]


def factors(steps: list[PlannedStep], warmup: int, schedule: str) -> list[float]:
    return [learning_rate_factor(p.step - 1, warmup, p.decay, schedule) for p in steps]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7, 30])
@pytest.mark.parametrize("length", [{"epochs": 3}, {"max_steps": 25}])
def test_steps_of_one_size_decay_exactly_by_their_number(schedule, warmup, length):
    index = made_index([("a", "a0", 10 * 3)])
    data = section([1.0], max_batch_size=1)
    steps = list(make_order(index, data, micro_batches_per_step=3, warmup_steps=warmup, **length))
    assert {planned.samples for planned in steps} == {3}
    total = len(steps)
    assert factors(steps, warmup, schedule) == [by_steps(n, total, warmup, schedule) for n in range(total)]


@pytest.mark.parametrize("seed", range(8))
def test_the_rate_decays_by_samples_however_they_are_batched(seed):
    rng = np.random.default_rng(seed)
    warmup, state, trained = 4, None, []
    while not trained or not trained[-1].last:
        micro_batches = int(rng.integers(1, 7))
        order = make_order(micro_batches_per_step=micro_batches, warmup_steps=warmup, epochs=4, state=state)
        trained += train(order, int(rng.integers(1, 12)))
        state = saved(order)
    sizes = np.array([planned.samples for planned in trained])
    assert len(set(sizes.tolist())) > 2
    done = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    start = sizes[:warmup].sum()
    expected = (done[warmup:] - start) / (sizes.sum() - start)
    np.testing.assert_allclose([planned.decay for planned in trained[warmup:]], expected, rtol=1e-12)
    assert [planned.decay for planned in trained[:warmup]] == [0.0] * warmup
    after = factors(trained, warmup, "cosine")[warmup:]
    assert after == sorted(after, reverse=True)
    assert len(set(after)) == len(after)


def test_sample_rows_are_spread_over_all_rows():
    assert list(sample_rows(3, 10)) == [0, 1, 2]
    assert list(sample_rows(101, 3)) == [0, 50, 100]
    assert list(sample_rows(0, 3)) == []


def test_sources_of_which_an_epoch_leaves_most_out_are_not_read_by_runs() -> None:
    index = made_index([("a", "a/0", 10), ("a", "a/1", 10), ("b", "b/0", 10), ("b", "b/1", 10)])
    data = DataSection(train=[{"path": "a"}, {"path": "b", "weight": 0.1}])
    sampler = EpochSampler(index, data, seed=0, micro_batches_per_step=1, epochs=1)
    # 22 samples, of which a lane mixes eight runs; those of `b` are one that is no run of neighbours in a shard.
    assert sampler.runs.starts.tolist() == [*range(0, 20, 2), 20, 40]
