"""Which points a search gives, in which order, and whether Optuna learns."""

import statistics
from itertools import islice
from math import log10
from typing import Any

import pytest

from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.search import key, make_search, random_points
from mowe_ray.sweeping.search_space import PointValues, SearchSpace

POOL = "model.weak_encoders"
MIXED = {
    POOL: {"subsets": {"sizes": [1, 2, 3]}},
    "model.router.top_k": {"int": [1, 3]},
    "training.mowe_loss.weight": {"loguniform": [1e-3, 1.0]},
}


def space(entries: dict[str, Any], **keys: Any) -> SearchSpace:
    keys = {"search": {"kind": "random"}, "budget": {"points": 9}} | keys
    return SearchSpace(SweepConfig.model_validate({"name": "s", "question": "Why?", "space": entries} | keys))


def test_random_points_are_reproducible_distinct_and_allowed() -> None:
    study = space(MIXED, constraints=["model.router.top_k <= pool_size"])
    points = list(islice(random_points(study, 3), 40))
    assert points == list(islice(random_points(study, 3), 40))
    assert points != list(islice(random_points(study, 4), 40))
    assert len({key(point) for point in points}) == 40
    assert all(point["model.router.top_k"] <= len(point[POOL]) for point in points)
    assert all(1e-3 <= point["training.mowe_loss.weight"] <= 1 for point in points)


def test_loguniform_is_uniform_in_the_logarithm() -> None:
    points = islice(random_points(space({"training.clip_norm": {"loguniform": [1e-4, 1.0]}}), 0), 400)
    weights = sorted(point["training.clip_norm"] for point in points)
    assert 0.7e-2 < statistics.median(weights) < 1.5e-2  # the middle of four decades


def test_random_points_of_a_finite_space_end() -> None:
    study = space({POOL: {"subsets": {"sizes": [1]}}, "model.router.top_k": {"choice": [1]}})
    assert len(list(random_points(study, 0))) == 3


def test_grid_entries_go_with_every_draw() -> None:
    study = space({"training.clip_norm": {"uniform": [0, 1]}, "model.fusion": {"grid": ["routed", "concat"]}})
    points = list(islice(random_points(study, 0), 6))
    assert [point["model.fusion"] for point in points] == ["routed", "concat"] * 3
    assert [points[0]["training.clip_norm"], points[2]["training.clip_norm"]] == [
        points[1]["training.clip_norm"],
        points[3]["training.clip_norm"],
    ]


WIDE = MIXED | {"training.learning_rate": {"loguniform": [1e-6, 1.0]}}


def objective(point: PointValues) -> float:
    """Known optimum, of 1: hubert and wav2vec2, both at a time, a weight of 0.1, a learning rate of 0.001."""
    pool = 0.5 * (point[POOL] == ["hubert", "wav2vec2"]) + 0.2 * ("hubert" in point[POOL])
    rate = abs(log10(point.get("training.learning_rate", 1e-3)) + 3)
    return pool + 0.3 * (point["model.router.top_k"] == 2) - abs(log10(point["training.mowe_loss.weight"]) + 1) - rate


def best(kind: str, seed: int, points: int = 40) -> float:
    search = {"kind": kind, "seed": seed, "startup_points": 8}
    study = space(WIDE, search=search, constraints=["model.router.top_k <= pool_size"])
    searching, found = make_search(study, ["max"]), []
    for _ in range(points):
        point = searching.next()
        assert point is not None
        assert study.rejection(point) is None
        found.append(objective(point))
        searching.tell(point, [found[-1]])
    return max(found)


@pytest.mark.slow
def test_optuna_improves_on_random_search() -> None:
    seeds = range(5)
    tpe, random = ([best(kind, seed) for seed in seeds] for kind in ("optuna", "random"))
    assert statistics.mean(tpe) > statistics.mean(random) + 0.2


@pytest.mark.slow
def test_optuna_goes_on_from_points_it_is_told_of() -> None:
    study = space(MIXED, search={"kind": "optuna", "startup_points": 2})
    earlier, fresh = make_search(study, ["max"]), make_search(study, ["max"])
    known = []
    for _ in range(12):
        point = earlier.next()
        assert point is not None
        earlier.tell(point, [objective(point)])
        fresh.tell(point, [objective(point)])
        known.append(key(point))
    following = fresh.next()
    assert following is not None
    assert key(following) not in known


@pytest.mark.slow
def test_optuna_weighs_two_objectives_and_survives_failures() -> None:
    searching = make_search(space(MIXED, search={"kind": "optuna", "startup_points": 3}), ["max", "min"])
    for trial in range(12):
        point = searching.next()
        assert point is not None
        searching.tell(point, None if trial % 4 == 3 else [objective(point), float(len(point[POOL]))])


@pytest.mark.parametrize("values", [[["whisper"], []], [{"a": 1}, None], [True, False], ["x", 2]])
def test_optuna_gives_back_the_values_it_was_given(values: list[Any]) -> None:
    from mowe_ray.sweeping.search import _read, _written
    from mowe_ray.sweeping.search_space import Dimension

    factor = Dimension("f", tuple(values))
    assert [_read(factor, _written(factor, value)) for value in values] == values
