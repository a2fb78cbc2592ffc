"""Scores of the points of a study by source and task, each with its difference to a baseline on the same clips.

Legend: P points, S seeds that all of them finished, N clips that all of their trials answered, D draws.

The interval of a difference holds two kinds of luck. That of the clips is resampled: each of the D draws weighs the N
clips anew, for all trials alike, so that the difference is paired. That of the training is a draw of Student's t with
(P - 1)(S - 1) degrees of freedom, times the root of 2 r / S, where r is the mean square of what is left of the P x S
scores after the means of their points and seeds, as in a two-way analysis of variance. Points of a study share a
seed's order of the data, so seeds are paired too. The noise of single answers is in both, which errs on the safe side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mowe_ray.evaluation.results import Interval
from mowe_ray.evaluation.scoring import interval_of, resamples
from mowe_ray.sweeping.analysis.points import Point
from mowe_ray.sweeping.clip_scores import Array, ClipScores, TaskClips, ratio

ALL_TASKS = ""
MOST_POINTS = 12
_DRAWS = 1000


@dataclass(frozen=True)
class TaskScore:
    """The score of a point on one task of a source, mean over seeds, and what it is more than the baseline's."""

    mean: float
    difference: Interval | None


@dataclass(frozen=True)
class TaskRow:
    """A task of a source; `ALL_TASKS` is the mean over its tasks.

    Attributes:
        clips: N, or their sum over the tasks.
        majority: Score of always giving the most frequent answer.
        scores: By number of the point; the baseline has no difference.
        seeds: S. With one, an interval does not hold what another seed would change.
    """

    source: str
    task: str
    clips: int
    majority: float
    scores: dict[int, TaskScore]
    seeds: int


@dataclass(frozen=True)
class ByTask:
    """The points of a study by source and task: the baseline first; of each source the tasks, then their mean.

    Attributes:
        unanswered: Trials that left no readable answers, by (source, task); such a task has no row.
    """

    points: Sequence[Point]
    rows: Sequence[TaskRow]
    unanswered: Mapping[tuple[str, str], Sequence[int]]


def baseline_of(found: Sequence[Point]) -> Point | None:
    """Return the point that the others are compared with: the one of fewest active parameters, of equals the first."""
    return min(found, key=lambda point: (point.active, point.number), default=None)


def compared(found: Sequence[Point], best_first: Sequence[Point]) -> list[Point]:
    """Return the points to compare, the baseline first: all complete ones in their order, of too many the best."""
    complete = [point for point in found if point.complete]
    baseline = baseline_of(complete)
    if baseline is None or len(complete) < 2:
        return []
    others = [point for point in best_first if point is not baseline][: MOST_POINTS - 1]
    return [baseline, *sorted(others, key=lambda point: point.number)]


def scores_by_task(shown: Sequence[Point], clips: ClipScores, seed: int = 0) -> ByTask:
    """Compare points, as `compared` returns them; `seed` is of the draws."""
    rows: list[TaskRow] = []
    for source in sorted({source for source, _ in clips.tasks}) if shown else ():
        tasks = {task: found for (name, task), found in sorted(clips.tasks.items()) if name == source}
        rows += _rows_of_source(source, shown, tasks, seed)
    wanted = sorted(number for numbers in _paired_trials(shown) for number in numbers)
    lacking = {key: [number for number in wanted if number not in found.trials] for key, found in clips.tasks.items()}
    return ByTask(shown, rows, {key: numbers for key, numbers in sorted(lacking.items()) if numbers})


def _rows_of_source(source: str, shown: Sequence[Point], tasks: dict[str, TaskClips], seed: int) -> Iterator[TaskRow]:
    trials = _paired_trials(shown)
    measured = []
    for place, (task, clips) in enumerate(tasks.items()):
        found = _measure(trials, clips, seed + place)
        if found is not None:
            number, scores, drawn = found
            measured.append((number, clips.majority, scores, drawn))
            yield _row(source, task, number, clips.majority, shown, scores, drawn, seed)
    if len(measured) > 1:
        counts, majorities, of_tasks, drawn_of_tasks = zip(*measured, strict=True)
        mean = np.mean(of_tasks, 0), np.mean(drawn_of_tasks, 0)
        yield _row(source, ALL_TASKS, sum(counts), float(np.mean(majorities)), shown, *mean, seed)


def _paired_trials(shown: Sequence[Point]) -> list[list[int]]:
    """Return P lists of the numbers of S trials, by seed."""
    by_seed = [{trial.seed: trial.number for trial in point.trials if trial.status == "finished"} for point in shown]
    seeds = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    return [[numbers[seed] for seed in seeds] for numbers in by_seed]


def _measure(trials: list[list[int]], clips: TaskClips, seed: int) -> tuple[int, Array, Array] | None:
    """Return N, the scores (P, S), and those of draws of clips (P, S, D); None without clips that all answered."""
    numbers = [number for row in trials for number in row]
    if not numbers or any(number not in clips.trials for number in numbers):
        return None
    statistics = np.stack([clips.trials[number] for number in numbers])  # (P * S, N, 2)
    statistics = statistics[:, ~np.isnan(statistics).any((0, 2))]
    count = statistics.shape[1]
    if not count:
        return None
    shape = len(trials), len(trials[0])
    drawn = np.concatenate([ratio(weights @ statistics) for weights in resamples(count, seed, _DRAWS)], 1)
    return count, ratio(statistics.sum(1)).reshape(shape), drawn.reshape(*shape, _DRAWS)


def _row(
    source: str,
    task: str,
    clips: int,
    majority: float,
    shown: Sequence[Point],
    scores: Array,
    drawn: Array,
    seed: int,
) -> TaskRow:
    luck = _training_luck(scores, np.random.default_rng(seed))
    means, of_draws = scores.mean(1), drawn.mean(1)  # (P,), (P, D)
    differences = [None] + [
        interval_of(np.array(means[p] - means[0]), of_draws[p] - of_draws[0] + luck) for p in range(1, len(shown))
    ]
    found = {
        point.number: TaskScore(float(mean), difference)
        for point, mean, difference in zip(shown, means, differences, strict=True)
    }
    return TaskRow(source, task, clips, majority, found, scores.shape[1])


def _training_luck(scores: Array, random: np.random.Generator) -> Array:
    """Return (D,) draws of what other seeds would change of the difference of two points; zeros with one seed."""
    points, seeds = scores.shape
    freedom = (points - 1) * (seeds - 1)
    if not freedom:
        return np.zeros(_DRAWS)
    left = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    error = float(np.sqrt(2 * (left**2).sum() / freedom / seeds))
    return error * random.standard_t(freedom, _DRAWS)
