"""Resumable batch sampler: the samples of each step of a run, from one epoch plan after the other.

A checkpoint has the number of the step in its plan, and counts per sample, so that a run can resume with other batches,
on other numbers of workers or with other shards, and still train every sample as often in an epoch as its weight says.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.epoch_plan import PLAN_VERSION, EpochPlan, Rows, StepRows, count_samples, cut_for, plan_epoch
from mowe_ray.data.index import Index
from mowe_ray.data.runs import Runs
from mowe_ray.training.collate import Batch
from mowe_ray.training.ledger import Changes, Counts, carry_over, describe, read_ledger, same_shards, write_ledger

_SPARSE = 0.5  # weight of a source below which to read runs whole would read more than twice too much


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step to come.

    Attributes:
        step: Optimizer steps finished once it is trained.
        epoch: Counted from 0.
        micro_batches: Index rows of each micro-batch of the global batch, whoever computes it; those are computed that
            are asked for.
        samples: Samples in the step, repeats counted.
        decay: Fraction of the run after warm-up that lies before this step, 0 to 1; see `learning_rate_factor`.
        progress: Fraction of the run that is done once it is trained.
        last: Whether the run ends with it.
    """

    step: int
    epoch: int
    micro_batches: Sequence[Rows]
    samples: int
    decay: float
    progress: float
    last: bool


@dataclass(frozen=True)
class _Position:
    """Position of a step in the run.

    Attributes:
        samples: Trained in the run so far.
        warmup_samples: Of these, trained during warm-up.
        plan: Of the epoch, or of what was left of it when this plan began.
        before: How often each sample was trained in the epoch by then; None if none was.
        absent: Counts of samples that are not there now.
        plan_step: Steps of the plan that are trained.
        left: Samples of the epoch still to train.
    """

    step: int
    samples: int
    warmup_samples: int
    epoch: int
    plan: EpochPlan
    before: Counts | None
    absent: list[dict[str, Any]]
    plan_step: int
    left: int


class EpochSampler:
    """The steps of a run, in order, from a position that moves as they are trained.

    Iterating yields the steps from the present position, as far ahead as the caller likes and in any thread;
    only `advance` moves the position.

    Attributes:
        changes: How the samples differ from those of the `state` it goes on from; None if they do not.
    """

    def __init__(
        self,
        index: Index,
        data: DataSection,
        *,
        seed: int,
        micro_batches_per_step: int,
        epochs: int | None = None,
        max_steps: int | None = None,
        warmup_steps: int = 0,
        state: dict[str, Any] | None = None,
        load_ids: Callable[[str], Index | None] = lambda _: None,
    ):
        """Begin a run, or go on from the `snapshot()` of an earlier one.

        If the plan that the earlier run followed can be planned again, it is followed to its end: a resumed run
        trains the same steps as an undisturbed one. Else what is left of the epoch is planned anew.

        Args:
            index: Training samples; they may be others than the earlier run had.
            micro_batches_per_step: Over all workers.
            epochs: Length of the run; or give max_steps.
            warmup_steps: Steps before the learning rate begins to decay.
            load_ids: As `carry_over` takes it, for samples that are not where they were.

        Raises:
            ValueError: They cannot be found again; see `carry_over`.
        """
        assert (epochs is None) != (max_steps is None)
        self._index, self._data, self._seed = index, data, seed
        self._micro_batches_per_step = micro_batches_per_step
        self._epochs, self._max_steps, self._warmup_steps = epochs, max_steps, warmup_steps
        self._weights = [source.weight for source in data.train]
        self._per_epoch = count_samples([*index.samples_per_source.values()], self._weights)
        assert self._per_epoch, "index_sources refuses a mixture without samples"
        self.changes: Changes | None = None
        if state is None:
            self._at = _Position(0, 0, 0, 0, self._plan(0), None, [], 0, self._per_epoch)
        else:
            self._at = self._restored(state, load_ids)

    def __iter__(self) -> Iterator[PlannedStep]:
        """Yield the steps from the present position to the end of the run."""
        return self._steps(self._at)  # of now, though the generator starts later, in another thread

    def advance(self, planned: PlannedStep) -> None:
        """Move the position past `planned`, the next step, which has been trained."""
        assert planned.step == self._at.step + 1
        if planned.epoch != self._at.epoch:
            self._at = self._next_epoch(self._at)
        self._at = self._after(self._at, planned.samples)

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that returns the present position as JSON, for a checkpoint, later and in any thread.

        It looks at all samples; what it returns grows with the shards, hardly with the samples.
        """
        return partial(self._state_at, self._at)

    def _state_at(self, at: _Position) -> dict[str, Any]:
        before = np.zeros(len(self._index), np.int32) if at.before is None else at.before
        return {
            "step": at.step,
            "samples": at.samples,
            "warmup_samples": at.warmup_samples,
            "epoch": at.epoch,
            "plan": self._plan_key,
            "plan_step": at.plan_step,
            "before": write_ledger(before, self._index),
            "trained": write_ledger(before + at.plan.counts_before(at.plan_step), self._index),
            "absent": at.absent,
            **self._described,
        }

    @cached_property
    def _described(self) -> dict[str, Any]:
        return describe(self._index)

    @cached_property
    def _plan_key(self) -> str:
        """A hash of all that plans depend on, apart from the epoch and what was trained in it."""
        limits = (self._data.batch_seconds, self._data.max_batch_size, self._data.shuffle_buffer)
        # Nothing is added for the default, so that hashes of before there was a choice stay as they were.
        mixed = () if self._data.group_by_length else ("mixed lengths",)
        settings = (PLAN_VERSION, self._seed, self._micro_batches_per_step, self._weights, *limits, *mixed)
        content = repr((settings, list(self._index.shard_digests.values()))).encode()
        return hashlib.blake2b(content + self._index.runs.starts.tobytes(), digest_size=16).hexdigest()

    @property
    def runs(self) -> Runs:
        """Neighbours that a rank trains about the same time, if not of all their source an epoch leaves most out."""
        runs = cut_for(self._index.runs, self._per_epoch, self._micro_batches_per_step, self._data.shuffle_buffer)
        sparse = np.asarray(self._weights)[runs.sources] < _SPARSE
        starts = np.ones(len(sparse), bool)
        starts[1:] = ~sparse[1:] | (runs.sources[1:] != runs.sources[:-1])
        return Runs(np.append(runs.starts[:-1][starts], runs.starts[-1:]), runs.sources[starts])

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return self._at.step

    @property
    def epoch(self) -> int:
        """Epoch under way, counted from 0."""
        return self._at.epoch

    @property
    def epochs_finished(self) -> int:
        """Epochs of which nothing is left to train."""
        return self._at.epoch + (self._at.left == 0)

    @property
    def progress(self) -> float:
        """Fraction of the run that is done: of its steps where they are given, else of its samples."""
        done, _, total = self._lengths(self._at)
        return min(1.0, done / total)

    def _restored(self, state: dict[str, Any], load_ids: Callable[[str], Index | None]) -> _Position:
        followed, absent = state.get("plan") == self._plan_key, state.get("absent", [])
        before: Counts | None
        if followed and same_shards(state, self._index):
            # What is usual, at any number of samples: nothing but the steps before is passed over, in whole rounds.
            before = read_ledger(state["before"], self._index) if state["before"] else None
        else:
            carried = carry_over(state, self._index, load_ids)
            before = carried.before if followed else carried.trained
            absent, self.changes = carried.absent, carried.changes
        plan = self._plan(int(state["epoch"]), before)
        plan_step = int(state["plan_step"]) if followed else 0
        left = plan.samples - plan.samples_before(plan_step)
        counts = {name: int(state[name]) for name in ("step", "samples", "warmup_samples", "epoch")}
        return _Position(**counts, plan=plan, before=before, absent=absent, plan_step=plan_step, left=left)

    def _steps(self, at: _Position) -> Iterator[PlannedStep]:
        while self._epochs is None or at.epoch < self._epochs:
            for micro_batches in at.plan.steps(at.plan_step):
                if at.step == self._max_steps:
                    return
                planned = self._planned(at, micro_batches)
                yield planned
                at = self._after(at, planned.samples)
            assert at.left == 0, "the closed form and the plan agree"
            at = self._next_epoch(at)

    def _plan(self, epoch: int, before: Counts | None = None) -> EpochPlan:
        return plan_epoch(
            self._index.durations,
            self._index.runs,
            self._weights,
            seed=self._seed,
            epoch=epoch,
            lanes=self._micro_batches_per_step,
            batch_seconds=self._data.batch_seconds,
            max_batch_size=self._data.max_batch_size,
            shuffle_buffer=self._data.shuffle_buffer,
            group_by_length=self._data.group_by_length,
            done=before,
        )

    def _planned(self, at: _Position, micro_batches: StepRows) -> PlannedStep:
        samples = micro_batches.samples
        done, warmup, total = self._lengths(at)
        done_after, *_ = self._lengths(self._after(at, samples))
        # Whole numbers until here: steps of equal size decay exactly as their number says.
        decay = 0.0 if at.step < self._warmup_steps else (done - warmup) / max(1, total - warmup)
        last, progress = done_after == total, done_after / total
        return PlannedStep(at.step + 1, at.epoch, micro_batches, samples, decay, progress, last)

    def _lengths(self, at: _Position) -> tuple[int, int, int]:
        """Return what is done, what of it was warm-up, and the length of the run, in one unit."""
        if self._max_steps is not None:
            return at.step, self._warmup_steps, self._max_steps
        assert self._epochs is not None
        return (
            at.samples,
            at.warmup_samples,
            at.samples + at.left + max(0, self._epochs - at.epoch - 1) * self._per_epoch,
        )

    def _after(self, at: _Position, samples: int) -> _Position:
        return replace(
            at,
            step=at.step + 1,
            plan_step=at.plan_step + 1,
            samples=at.samples + samples,
            warmup_samples=at.warmup_samples + (samples if at.step < self._warmup_steps else 0),
            left=at.left - samples,
        )

    def _next_epoch(self, at: _Position) -> _Position:
        epoch = at.epoch + 1
        plan = self._plan(epoch) if self._epochs is None or epoch < self._epochs else at.plan
        return replace(at, epoch=epoch, plan=plan, before=None, absent=[], plan_step=0, left=self._per_epoch)


def rows_of_rank(micro_batches: Sequence[Rows], rank: int, world_size: int) -> list[Rows]:
    """Return the micro-batches of a rank: numbers r, r + W, ... of W ranks, equally many on every rank.

    Where W does not divide their number, the missing ones are empty.
    """
    rows = list(micro_batches[rank::world_size])
    # Every rank takes part in every collective, also without rows of its own.
    return rows + [np.zeros(0, np.int64)] * (-(-len(micro_batches) // world_size) - len(rows))


def with_batches(
    order: Iterable[PlannedStep],
    load: Callable[[Iterator[Rows]], Iterator[Batch]],
    rank: int,
    world_size: int,
    change: Callable[[Sequence[Rows]], Sequence[Rows]] = lambda micro_batches: micro_batches,
) -> Iterator[tuple[PlannedStep, list[Batch]]]:
    """Yield the steps to come, each with this rank's micro-batches.

    Args:
        load: Turns rows into micro-batches, one each and in order; it may run ahead, in another thread.
        change: Returns the micro-batches that are run for the planned ones of a step, the same on every rank.
    """
    # `rows` runs in the loader's thread, ahead of the steps: what it has planned waits here for its batches.
    ahead: deque[tuple[PlannedStep, list[Rows]]] = deque()
    steps = iter(order)

    def rows() -> Iterator[Rows]:
        for planned in steps:
            mine = rows_of_rank(change(planned.micro_batches), rank, world_size)
            ahead.append((planned, mine))
            yield from mine

    batches = load(rows())
    for first in batches:
        planned, mine = ahead.popleft()
        # The loader keeps the order, so that the next batches are those of the oldest step that waits.
        step = [first, *islice(batches, len(mine) - 1)]
        assert [len(batch.ids) + len(batch.bad) for batch in step] == list(map(len, mine))
        yield planned, step
