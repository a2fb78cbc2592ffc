"""Which samples make up each micro-batch of an epoch: computed, not stored, from a seed.

The plan depends on the samples, the seed and the epoch, never on the number of workers: rank r of W trains lanes
r, r + W, ... of each step. Runs of neighbouring samples are permuted, and dealt to the lanes in rounds. Within a round
each lane shuffles the samples of its own runs, and all lanes have equally many micro-batches. So the sizes of a round
follow from counts of its runs, and single samples are looked at only for the lanes and steps that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from mowe_ray.data.runs import LengthClasses, Runs

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

PLAN_VERSION = 2  # raise it when the same arguments give another plan
RUNS_PER_LANE = 64  # that a lane mixes in a round, so sorted corpora get mixed
_LEAST_RUNS = 8  # of a lane; in a small corpus, runs become shorter instead


def plan_epoch(
    durations: npt.NDArray[np.floating],
    runs: Runs,
    weights: Sequence[float],
    *,
    seed: int,
    epoch: int,
    lanes: int,
    batch_seconds: float,
    max_batch_size: int,
    shuffle_buffer: int,
    group_by_length: bool = True,
    done: npt.NDArray[np.integer] | None = None,
) -> EpochPlan:
    """Plan the steps of an epoch; each is `lanes` micro-batches of sample numbers.

    Every sample comes exactly as often as its source's weight says. A micro-batch holds at most `max_batch_size` clips
    and `batch_seconds` seconds including padding (one longer clip stays alone). One is empty only where a lane has
    fewer samples than its round has steps, as in an epoch of few samples.

    Args:
        durations: (N,) seconds; 0 for text-only samples.
        runs: neighbours that are read together where possible.
        weights: passes over each source per epoch; 2.5 is two passes and a half that moves on every epoch.
        seed: same seed, same plan.
        epoch: every epoch has its own order.
        lanes: micro-batches per optimiser step, over all workers.
        batch_seconds: limit of a micro-batch, number of clips times the longest.
        max_batch_size: limit of a micro-batch in clips.
        shuffle_buffer: most samples that a lane mixes at a time.
        group_by_length: form micro-batches of clips of like length, else of a lane's samples as they come.
        done: (N,) how often each sample was trained on in this epoch; the plan is what is left.
    """
    classes = LengthClasses.of(durations, batch_seconds, max_batch_size, grouped=group_by_length)
    left = count_samples(runs.sizes(len(weights)), weights) - (0 if done is None else int(done.sum()))
    runs = cut_for(runs, left, lanes, shuffle_buffer)
    streams = []
    for source, weight in enumerate(weights):
        first, last = np.searchsorted(runs.sources, [source, source + 1]).tolist()
        starts = runs.starts[first : last + 1]
        times = None if done is None else done[starts[0] : starts[-1]]
        members = _passes(int(starts[-1] - starts[0]), weight, [seed, source], epoch, times)
        rng = np.random.default_rng([seed, epoch, source])
        streams.append([_Pass.permuted(starts, member, classes, durations, rng) for member in members])
    return EpochPlan(durations, classes, _Order.of(streams, len(classes.most)), (seed, epoch), lanes)


def cut_for(runs: Runs, samples: int, lanes: int, shuffle_buffer: int) -> Runs:
    """Return runs as short as a plan of so many samples needs them."""
    return runs.cut(max(1, min(shuffle_buffer // RUNS_PER_LANE, samples // (lanes * _LEAST_RUNS))))


def count_samples(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Return how many samples an epoch has of sources of these sizes, repeats counted."""
    return sum(sum(_whole_and_part(weight, size)) for size, weight in zip(sizes, weights, strict=True))


def _whole_and_part(weight: float, size: int) -> tuple[int, int]:
    """Return how many samples the full passes over a source have together, and the part of a pass after them."""
    return int(weight) * size, round((weight - int(weight)) * size)


def _passes(
    size: int, weight: float, seed: list[int], epoch: int, times: npt.NDArray[np.integer] | None
) -> Iterator[Mask | None]:
    """Yield which samples are left of each pass, None for all; the last, a part of one, moves on every epoch."""
    whole, (_, part) = int(weight), _whole_and_part(weight, size)
    for number in range(whole):
        yield None if times is None else times <= number
    if part:
        order = np.random.default_rng(seed).permutation(size)
        # The same permutation in all epochs, entered where the previous one ended: over 1 / fraction epochs every
        # sample comes equally often.
        window = order[(epoch * part + np.arange(part)) % size]
        if times is not None:
            # Who has had its extra turn keeps its place, even if the source has grown or shrunk since.
            window = window[times[window] <= whole][: max(0, part - int((times > whole).sum()))]
        member = np.zeros(size, bool)
        member[window] = True
        yield member


@dataclass(frozen=True)
class _Pass:
    """The runs of a pass over a source, in the order in which they are trained.

    R runs; B classes of length.

    Attributes:
        starts: (R,) first row of each; `stops` (R,) the row after its last.
        histograms: (R, B) samples of each class.
        first: row of the first sample of the source.
        member: which samples of the source take part; None for all.
    """

    starts: Rows
    stops: Rows
    histograms: npt.NDArray[np.int32]
    first: int
    member: Mask | None

    @classmethod
    def permuted(
        cls,
        starts: Rows,
        member: Mask | None,
        classes: LengthClasses,
        durations: npt.NDArray[np.floating],
        rng: np.random.Generator,
    ) -> _Pass:
        """Permute the runs that have samples left."""
        histograms = classes.histograms(durations, starts, member)
        order = rng.permutation(np.flatnonzero(histograms.sum(axis=1)))
        return cls(starts[:-1][order], starts[1:][order], histograms[order], int(starts[0]), member)

    def rows(self, run: int) -> Rows:
        """Return the samples of a run."""
        start, stop = int(self.starts[run]), int(self.stops[run])
        if self.member is None:
            return np.arange(start, stop)
        return start + np.flatnonzero(self.member[start - self.first : stop - self.first])

    def add_counts(self, counts: npt.NDArray[np.int32], runs: int) -> None:
        """Count the samples of the first `runs` runs."""
        ends = np.zeros(len(counts) - self.first + 1, np.int8)
        ends[self.starts[:runs] - self.first] += 1
        ends[self.stops[:runs] - self.first] -= 1
        taken = np.cumsum(ends[:-1], dtype=np.int8)
        if self.member is None:
            counts[self.first :] += taken
        else:
            counts[self.first : self.first + len(self.member)] += taken[: len(self.member)] * self.member


@dataclass(frozen=True)
class _Order:
    """All runs of an epoch in the order in which they are dealt to the lanes.

    Attributes:
        passes: of all sources.
        owner: (R,) which pass a run belongs to; the runs of a pass keep their order.
        number: (R,) its number in the pass.
        histograms: (R, B) samples of each class.
    """

    passes: list[_Pass]
    owner: npt.NDArray[np.int64]
    number: npt.NDArray[np.int64]
    histograms: npt.NDArray[np.int32]

    @classmethod
    def of(cls, streams: Sequence[Sequence[_Pass]], num_classes: int) -> _Order:
        """Merge sources, each one pass after the other, in proportion to their samples: all end together."""
        passes = [one for stream in streams for one in stream]
        sizes = [len(one.starts) for one in passes]
        owner = np.repeat(np.arange(len(passes)), sizes)
        number = np.concatenate([np.zeros(0, np.int64), *map(np.arange, sizes)])
        histograms = np.concatenate([np.zeros((0, num_classes), np.int32), *(one.histograms for one in passes)])
        counts, progress, first = histograms.sum(axis=1, dtype=np.int64), np.zeros(len(owner)), 0
        for stream in streams:
            last = first + sum(len(one.starts) for one in stream)
            own = counts[first:last]
            # Centred in its share of the epoch, so that a short stream is not drawn to either end.
            progress[first:last] = (2 * np.cumsum(own) - own) / max(1, 2 * int(own.sum()))
            first = last
        order = np.argsort(progress, kind="stable")
        return cls(passes, owner[order], number[order], histograms[order])

    def rows(self, runs: Iterable[int]) -> Rows:
        """Return the samples of runs."""
        parts = [self.passes[self.owner[run]].rows(self.number[run]) for run in runs]
        return np.concatenate([np.zeros(0, np.int64), *parts])


class EpochPlan:
    """The steps of an epoch. Iterating yields them in order, in any thread; no step is kept.

    Attributes:
        samples: how many samples it has, repeats counted.
    """

    def __init__(
        self,
        durations: npt.NDArray[np.floating],
        classes: LengthClasses,
        order: _Order,
        seed: tuple[int, int],
        lanes: int,
    ) -> None:
        self._durations, self._classes, self._order, self._seed, self._lanes = durations, classes, order, seed, lanes
        self.samples = int(order.histograms.sum())

    def __iter__(self) -> Iterator[StepRows]:
        return self.steps()

    def steps(self, start: int = 0) -> Iterator[StepRows]:
        """Yield the steps from number `start` on; what lies before is passed over round by round."""
        for one in self._rounds():
            yield from (StepRows(one, number) for number in range(start, one.steps))
            start = max(0, start - one.steps)

    def samples_before(self, step: int) -> int:
        """Return how many samples the steps before number `step` have."""
        found = 0
        for one in self._rounds():
            if step < one.steps:
                return found + int(one.sizes[:, :step].sum())
            found, step = found + int(self._order.histograms[one.first : one.last].sum()), step - one.steps
        return found

    def counts_before(self, step: int) -> npt.NDArray[np.int32]:
        """Return (N,) how often each sample comes in the steps before number `step`."""
        counts, done = np.zeros(len(self._durations), np.int32), 0
        for one in self._rounds():
            if step < one.steps:
                steps = (StepRows(one, number) for number in range(step))
                rows = np.concatenate([np.zeros(0, np.int64), *(rows for found in steps for rows in found)])
                np.add.at(counts, rows, 1)
                break
            done, step = one.last, step - one.steps
        for number, one_pass in enumerate(self._order.passes):
            one_pass.add_counts(counts, int((self._order.owner[:done] == number).sum()))
        return counts

    def _rounds(self) -> Iterator[_Round]:
        runs = len(self._order.owner)
        number = -(-runs // (RUNS_PER_LANE * self._lanes))
        for n in range(number):
            seed = (*self._seed, n)
            yield _Round(
                self._durations,
                self._classes,
                self._order,
                seed,
                self._lanes,
                n * runs // number,
                (n + 1) * runs // number,
            )


@dataclass(frozen=True)
class _Round:
    """Runs `first` to `last` of an epoch, dealt to the lanes.

    L lanes; M steps.
    """

    durations: npt.NDArray[np.floating]
    classes: LengthClasses
    order: _Order
    seed: tuple[int, ...]
    lanes: int
    first: int
    last: int

    @cached_property
    def lane(self) -> npt.NDArray[np.int64]:
        """(last - first,) lane of each run: equally many a lane, and about as many micro-batches."""
        share = np.asarray([(1 << 20) // most for most in self.classes.most], np.int64)
        cost = self.order.histograms[self.first : self.last] @ share
        lane, load = np.zeros(len(cost), np.int64), np.zeros(self.lanes, np.int64)
        for start in range(0, len(cost) if self.lanes > 1 else 0, self.lanes):
            dearest = start + np.argsort(-cost[start : start + self.lanes], kind="stable")
            lightest = np.argsort(load, kind="stable")[: len(dearest)]
            lane[dearest] = lightest
            load[lightest] += cost[dearest]
        return lane

    @cached_property
    def histograms(self) -> list[list[int]]:
        """(L, B) samples of each class."""
        found = np.zeros((self.lanes, len(self.classes.most)), np.int64)
        np.add.at(found, self.lane, self.order.histograms[self.first : self.last])
        return found.tolist()

    @cached_property
    def steps(self) -> int:
        """M."""
        return max(len(self.classes.micro_batches(histogram)) for histogram in self.histograms)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(L, M) samples of each micro-batch."""
        cuts = map(self._cut, range(self.lanes))
        return np.stack([sizes[order] for sizes, order in cuts])

    def rows(self, lane: int, step: int) -> Rows:
        """Return the samples of a micro-batch."""
        if lane not in self._micro_batches:
            self._micro_batches[lane] = self._formed(lane)
        return self._micro_batches[lane][step]

    @cached_property
    def _micro_batches(self) -> dict[int, list[Rows]]:
        return {}

    def _cut(self, lane: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (M,) sizes of a lane's micro-batches, from short to long clips, and the order of their training."""
        sizes = self.classes.micro_batches(self.histograms[lane], self.steps)
        return np.asarray(sizes, np.int64), np.random.default_rng([*self.seed, lane]).permutation(len(sizes))

    def _formed(self, lane: int) -> list[Rows]:
        sizes, order = self._cut(lane)
        rows = self.order.rows(self.first + np.flatnonzero(self.lane == lane))
        rows = np.random.default_rng([*self.seed, lane, 1]).permutation(rows)
        if len(self.classes.edges_ms):
            # Within their classes, too: what is left of one for the next are its longest.
            rows = rows[np.argsort(self.durations[rows], kind="stable")]
        parts = np.split(rows, np.cumsum(sizes)[:-1])
        return [parts[place] for place in order.tolist()]


class StepRows(Sequence[Rows]):
    """The rows of each micro-batch of a step, by lane; computed for the lanes that are asked for."""

    def __init__(self, of_round: _Round, step: int) -> None:
        self._round, self._step = of_round, step

    @property
    def samples(self) -> int:
        """Samples of all micro-batches."""
        return int(self._round.sizes[:, self._step].sum())

    def __len__(self) -> int:
        return self._round.lanes

    @overload
    def __getitem__(self, lane: int) -> Rows: ...
    @overload
    def __getitem__(self, lane: slice) -> list[Rows]: ...
    def __getitem__(self, lane: int | slice) -> Rows | list[Rows]:
        """Return the rows of a lane, or of several."""
        lanes = range(len(self))[lane]
        if isinstance(lanes, range):
            return [self._round.rows(one, self._step) for one in lanes]
        return self._round.rows(lanes, self._step)
