"""Resumable batch sampler: the samples of each step of a run, from one epoch plan after the other.

The position is kept as counts per sample, so a run can resume with other batches, on other numbers of
workers or with other shards, and still train every sample as often in an epoch as its weight says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.epoch_plan import Rows, count_samples, plan_epoch
from mowe_ray.data.index import Index
from mowe_ray.training.collate import Batch
from mowe_ray.training.ledger import Changes, Counts, carry_over, describe, write_ledger


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step to come.

    Attributes:
        step: Optimizer steps finished once it is trained.
        epoch: Counted from 0.
        micro_batches: Index rows of each micro-batch of the global batch, whoever computes it.
        decay: Fraction of the run after warm-up that lies before this step, 0 to 1; see `learning_rate_factor`.
        progress: Fraction of the run that is done once it is trained.
        last: Whether the run ends with it.
    """

    step: int
    epoch: int
    micro_batches: list[Rows]
    decay: float
    progress: float
    last: bool

    @property
    def samples(self) -> int:
        """Samples in the step, repeats counted."""
        return sum(map(len, self.micro_batches))


@dataclass(frozen=True)
class _Position:
    """Position of a step in the run; `before` identifies the plan and `plan_step` the step in it.

    Attributes:
        samples: Trained in the run so far.
        warmup_samples: Of these, trained during warm-up.
        before: How often each sample was trained in the epoch when its present plan began.
        left: Samples of the epoch still to train.
    """

    step: int
    samples: int
    warmup_samples: int
    epoch: int
    before: Counts
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
        """Begin a run, or go on from the `state()` of an earlier one.

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
        self._shards, self._sources, self._durations = index.shards, index.sources, index.durations
        self._weights = [source.weight for source in data.train]
        self._per_epoch = count_samples(self._sources, self._weights)
        assert self._per_epoch, "index_sources refuses a mixture without samples"
        self._trained = np.zeros(len(index), np.int32)
        self._at = _Position(0, 0, 0, 0, self._trained.copy(), 0, self._per_epoch)
        self._absent: list[dict[str, Any]] = []
        self.changes: Changes | None = None
        if state is not None:
            self._restore(state, load_ids)

    def __iter__(self) -> Iterator[PlannedStep]:
        """Yield the steps from the present position to the end of the run."""
        return self._steps(self._at)  # of now, though the generator starts later, in another thread

    def advance(self, planned: PlannedStep) -> None:
        """Move the position past `planned`, the next step, which has been trained."""
        assert planned.step == self._at.step + 1
        if planned.epoch != self._at.epoch:
            self._at = self._next_epoch(self._at)
            self._trained = self._at.before.copy()
            self._absent = []
        _count(self._trained, planned.micro_batches)
        self._at = self._after(self._at, planned.samples)

    def state(self) -> dict[str, Any]:
        """Return the position as JSON, for a checkpoint; its size grows with the shards, hardly with the samples."""
        at = self._at
        return {
            "step": at.step,
            "samples": at.samples,
            "warmup_samples": at.warmup_samples,
            "epoch": at.epoch,
            "plan_step": at.plan_step,
            "before": write_ledger(at.before, self._index),
            "trained": write_ledger(self._trained, self._index),
            "absent": self._absent,
            **self._described,
        }

    @cached_property
    def _described(self) -> dict[str, Any]:
        return describe(self._index)

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

    def _restore(self, state: dict[str, Any], load_ids: Callable[[str], Index | None]) -> None:
        carried = carry_over(state, self._index, load_ids)
        before, self._trained = carried.before, carried.trained
        self._absent, self.changes = carried.absent, carried.changes
        found, plan_step = before.copy(), int(state["plan_step"])
        # Replays the plan up to the saved step. Equal counts show that the data and the limits still give the same
        # plan.
        for micro_batches in islice(self._plan(state["epoch"], before), plan_step):
            _count(found, micro_batches)
        if not np.array_equal(found, self._trained):
            before, plan_step = self._trained.copy(), 0
        left = count_samples(self._sources, self._weights, self._trained)
        counts = {name: int(state[name]) for name in ("step", "samples", "warmup_samples", "epoch")}
        self._at = _Position(**counts, before=before, plan_step=plan_step, left=left)

    def _steps(self, at: _Position) -> Iterator[PlannedStep]:
        while self._epochs is None or at.epoch < self._epochs:
            for micro_batches in islice(self._plan(at.epoch, at.before), at.plan_step, None):
                if at.step == self._max_steps:
                    return
                yield self._planned(at, micro_batches)
                at = self._after(at, sum(map(len, micro_batches)))
            assert at.left == 0, "the closed form and the plan agree"
            at = self._next_epoch(at)

    def _plan(self, epoch: int, before: Counts) -> Iterator[list[Rows]]:
        return plan_epoch(
            self._durations,
            self._shards,
            self._sources,
            self._weights,
            seed=self._seed,
            epoch=epoch,
            lanes=self._micro_batches_per_step,
            batch_seconds=self._data.batch_seconds,
            max_batch_size=self._data.max_batch_size,
            shuffle_buffer=self._data.shuffle_buffer,
            done=before,
        )

    def _planned(self, at: _Position, micro_batches: list[Rows]) -> PlannedStep:
        done, warmup, total = self._lengths(at)
        done_after, *_ = self._lengths(self._after(at, sum(map(len, micro_batches))))
        # Whole numbers until here: steps of equal size decay exactly as their number says.
        decay = 0.0 if at.step < self._warmup_steps else (done - warmup) / max(1, total - warmup)
        return PlannedStep(at.step + 1, at.epoch, micro_batches, decay, done_after / total, last=done_after == total)

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
        fresh = np.zeros_like(at.before)
        return replace(at, epoch=at.epoch + 1, before=fresh, plan_step=0, left=self._per_epoch)


def _count(counts: Counts, micro_batches: list[Rows]) -> None:
    np.add.at(counts, np.concatenate(micro_batches), 1)


def rows_of_rank(micro_batches: list[Rows], rank: int, world_size: int) -> list[Rows]:
    """Return the micro-batches of a rank: numbers r, r + W, ... of W ranks, equally many on every rank.

    Where W does not divide their number, the missing ones are empty.
    """
    rows = micro_batches[rank::world_size]
    # Every rank takes part in every collective, also without rows of its own.
    return rows + [np.zeros(0, np.int64)] * (-(-len(micro_batches) // world_size) - len(rows))


def with_batches(
    order: Iterable[PlannedStep],
    load: Callable[[Iterator[Rows]], Iterator[Batch]],
    rank: int,
    world_size: int,
    change: Callable[[list[Rows]], list[Rows]] = lambda micro_batches: micro_batches,
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
