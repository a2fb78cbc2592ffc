"""Search algorithms: grid, random, and Optuna, which learns from the values of finished points."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, Protocol

import optuna

from mowe_ray.sweeping.one_shot import Supernet, one_shot_points
from mowe_ray.sweeping.search_space import Dimension, PointValues, SearchSpace

# Draws against the constraints, or of points that were there before, after which the space counts as exhausted.
_DRAWS = 1000


Directions = Sequence[Literal["min", "max"]]
"""Of the objectives."""


class Search(Protocol):
    """Interface of search algorithms: the ask-and-tell interface of Optuna's studies."""

    def next(self) -> PointValues | None:
        """Return a new point, None when there is none."""

    def tell(self, point: PointValues, values: Sequence[float] | None) -> None:
        """Report the values of a finished point, one per objective; None if its trials failed."""


def make_search(space: SearchSpace, directions: Directions, supernets: Sequence[Supernet] = ()) -> Search:
    """Return the search that a study's configuration names; `supernets` are those of one-shot that have scores."""
    search = space.sweep.search
    if search.kind == "oneshot":
        return ListedSearch(one_shot_points(space, supernets))
    if search.kind == "optuna":
        return OptunaSearch(space, directions, seed=search.seed, startup_points=search.startup_points)
    return ListedSearch(space.points() if search.kind == "grid" else random_points(space, search.seed))


class ListedSearch:
    """Points in a fixed order, whatever earlier ones gave."""

    def __init__(self, points: Iterator[PointValues]):
        self._points = points

    def next(self) -> PointValues | None:
        return next(self._points, None)

    def tell(self, point: PointValues, values: Sequence[float] | None) -> None:
        """Do nothing: no point depends on another."""


def random_points(space: SearchSpace, seed: int) -> Iterator[PointValues]:
    """Yield allowed points, each once: every draw of the other entries with all values of the `grid` ones.

    The same seed yields the same points in the same order.
    """
    generator = random.Random(seed)
    drawn = [dimension for dimension in space.dimensions if not dimension.always]
    crossed = [dimension for dimension in space.dimensions if dimension.always]
    seen: set[str] = set()
    in_vain = 0
    # A finite space is exhausted at some time, and constraints may leave little: after so many repeats in a row nothing
    # new is expected.
    while in_vain < _DRAWS:
        in_vain += 1
        draw = {dimension.name: _draw(dimension, generator) for dimension in drawn}
        for values in product(*(dimension.values for dimension in crossed)):
            chosen = draw | dict(zip((dimension.name for dimension in crossed), values, strict=True))
            point = {dimension.name: chosen[dimension.name] for dimension in space.dimensions}  # in the file's order
            if key(point) not in seen and space.rejection(point) is None:
                seen.add(key(point))
                in_vain = 0
                yield point
        if not drawn:
            return


def _draw(dimension: Dimension, generator: random.Random) -> Any:
    if dimension.bounds is None:
        return generator.choice(dimension.values)
    low, high = dimension.bounds
    if dimension.log:
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high)


def key(point: PointValues) -> str:
    """Return a text that equal points share."""
    return json.dumps(point, sort_keys=True)


class OptunaSearch:
    """Optuna's tree-structured Parzen estimator (TPE), for one objective or several."""

    def __init__(self, space: SearchSpace, directions: Directions, *, seed: int, startup_points: int):
        optuna.logging.set_verbosity(logging.WARNING)
        self._space, self._dimensions = space, space.dimensions
        self._study = optuna.create_study(
            # Multivariate: pool, top-k and loss weight are not independent.
            sampler=optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=startup_points,
                multivariate=True,
                constant_liar=True,
            ),
            directions=["maximize" if direction == "max" else "minimize" for direction in directions],
        )
        self._distributions = {dimension.name: _distribution(dimension) for dimension in space.dimensions}
        self._open: dict[str, optuna.Trial] = {}
        self._known: set[str] = set()

    def next(self) -> PointValues | None:
        for _ in range(_DRAWS):
            trial = self._study.ask(self._distributions)
            point = {
                dimension.name: _read(dimension, trial.params[dimension.name]) for dimension in self._space.dimensions
            }
            if key(point) not in self._known and self._space.rejection(point) is None:
                self._known.add(key(point))
                self._open[key(point)] = trial
                return point
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def tell(self, point: PointValues, values: Sequence[float] | None) -> None:
        """See `Search`; the point may also come from an earlier run of the study."""
        self._known.add(key(point))
        trial = self._open.pop(key(point), None)
        if trial is not None:
            failed = optuna.trial.TrialState.FAIL
            self._study.tell(trial, values, state=failed if values is None else None)
        elif values is not None:
            params = {
                dimension.name: _written(dimension, point[dimension.name]) for dimension in self._space.dimensions
            }
            self._study.add_trial(
                optuna.trial.create_trial(params=params, distributions=self._distributions, values=list(values))
            )


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    if dimension.bounds is not None:
        return optuna.distributions.FloatDistribution(*dimension.bounds, log=dimension.log)
    if all(type(value) is int for value in dimension.values) and list(dimension.values) == list(
        range(dimension.values[0], dimension.values[-1] + 1)
    ):
        return optuna.distributions.IntDistribution(dimension.values[0], dimension.values[-1])
    return optuna.distributions.CategoricalDistribution([_written(dimension, value) for value in dimension.values])


def _written(dimension: Dimension, value: Any) -> Any:
    """Return a value as Optuna keeps it: categories are scalars, pools and mappings travel as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _read(dimension: Dimension, value: Any) -> Any:
    structured = {_written(dimension, known): known for known in dimension.values if isinstance(known, list | dict)}
    return structured.get(value, value) if isinstance(value, str) else value
