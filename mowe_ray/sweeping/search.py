"""How points of the space are chosen: all of them, at random, or by Optuna from what finished ones gave."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, Protocol

import optuna

from mowe_ray.sweeping.search_space import Factor, Point, Space

# Draws against the constraints, or of points that were there before, after which the space counts as exhausted.
_DRAWS = 1000


class Search(Protocol):
    """A source of points."""

    def next(self) -> Point | None:
        """Return a new point, None when there is none."""

    def tell(self, point: Point, values: Sequence[float] | None) -> None:
        """Learn what the trials of a point gave, one value an objective; None if they failed."""


def make_search(space: Space, directions: Sequence[Literal["min", "max"]]) -> Search:
    """Return the search of a study; `directions` of its objectives."""
    search = space.sweep.search
    if search.kind == "optuna":
        return OptunaSearch(space, directions, seed=search.seed, startup_points=search.startup_points)
    return ListedSearch(space.points() if search.kind == "grid" else random_points(space, search.seed))


class ListedSearch:
    """Points that do not depend on what was found."""

    def __init__(self, points: Iterator[Point]):
        self._points = points

    def next(self) -> Point | None:
        return next(self._points, None)

    def tell(self, point: Point, values: Sequence[float] | None) -> None:
        """Nothing is learned."""


def random_points(space: Space, seed: int) -> Iterator[Point]:
    """Yield allowed points, each once: every draw of the other entries with all values of the `grid` ones.

    The same seed yields the same points in the same order.
    """
    generator = random.Random(seed)
    drawn = [factor for factor in space.factors if not factor.always]
    crossed = [factor for factor in space.factors if factor.always]
    seen: set[str] = set()
    in_vain = 0
    while in_vain < _DRAWS:
        in_vain += 1
        draw = {factor.name: _draw(factor, generator) for factor in drawn}
        for values in product(*(factor.values for factor in crossed)):
            chosen = draw | dict(zip((factor.name for factor in crossed), values, strict=True))
            point = {factor.name: chosen[factor.name] for factor in space.factors}  # in the file's order
            if key(point) not in seen and space.refused(point) is None:
                seen.add(key(point))
                in_vain = 0
                yield point
        if not drawn:
            return


def _draw(factor: Factor, generator: random.Random) -> Any:
    if factor.bounds is None:
        return generator.choice(factor.values)
    low, high = factor.bounds
    if factor.log:
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high)


def key(point: Point) -> str:
    """Return a text that equal points share."""
    return json.dumps(point, sort_keys=True)


class OptunaSearch:
    """Optuna's tree-structured Parzen estimator (TPE), for one objective or several."""

    def __init__(self, space: Space, directions: Sequence[Literal["min", "max"]], *, seed: int, startup_points: int):
        optuna.logging.set_verbosity(logging.WARNING)
        self._space = space
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
        self._distributions = {factor.name: _distribution(factor) for factor in space.factors}
        self._open: dict[str, optuna.Trial] = {}
        self._known: set[str] = set()

    def next(self) -> Point | None:
        for _ in range(_DRAWS):
            trial = self._study.ask(self._distributions)
            point = {factor.name: _read(factor, trial.params[factor.name]) for factor in self._space.factors}
            if key(point) not in self._known and self._space.refused(point) is None:
                self._known.add(key(point))
                self._open[key(point)] = trial
                return point
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def tell(self, point: Point, values: Sequence[float] | None) -> None:
        """See `Search`; the point may also come from an earlier run of the study."""
        self._known.add(key(point))
        trial = self._open.pop(key(point), None)
        if trial is not None:
            failed = optuna.trial.TrialState.FAIL
            self._study.tell(trial, values, state=failed if values is None else None)
        elif values is not None:
            params = {factor.name: _written(factor, point[factor.name]) for factor in self._space.factors}
            self._study.add_trial(
                optuna.trial.create_trial(params=params, distributions=self._distributions, values=list(values))
            )


def _distribution(factor: Factor) -> optuna.distributions.BaseDistribution:
    if factor.bounds is not None:
        return optuna.distributions.FloatDistribution(*factor.bounds, log=factor.log)
    if all(type(value) is int for value in factor.values) and list(factor.values) == list(
        range(factor.values[0], factor.values[-1] + 1)
    ):
        return optuna.distributions.IntDistribution(factor.values[0], factor.values[-1])
    return optuna.distributions.CategoricalDistribution([_written(factor, value) for value in factor.values])


def _written(factor: Factor, value: Any) -> Any:
    """Return a value as Optuna keeps it: categories are scalars, pools and mappings travel as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _read(factor: Factor, value: Any) -> Any:
    structured = {_written(factor, known): known for known in factor.values if isinstance(known, list | dict)}
    return structured.get(value, value) if isinstance(value, str) else value
