"""Points, pools, constraints, and the configuration a point means."""

from itertools import product
from math import comb
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.search_space import Constraint, SearchSpace

POOL = "model.weak_encoders"


def space(entries: dict[str, Any], **keys: Any) -> SearchSpace:
    return SearchSpace(SweepConfig.model_validate({"name": "s", "question": "Why?", "space": entries} | keys))


def test_subsets_are_all_combinations_of_the_library() -> None:
    points = list(space({POOL: {"subsets": {"sizes": [0, 1, 2, 3]}}}).points())
    assert len(points) == sum(comb(3, size) for size in range(4))
    assert {"model.weak_encoders": ["whisper", "wav2vec2"]} in points


def test_repeats_and_lists_join_and_equal_pools_are_one() -> None:
    entry = {"subsets": {"of": ["hubert"], "sizes": [1]}, "repeats": {"of": ["hubert"], "times": [1, 2]}}
    points = list(space({POOL: entry | {"pools": [["hubert", "hubert"], ["hubert", "whisper"]]}}).points())
    assert [point[POOL] for point in points] == [["hubert"], ["hubert", "hubert"], ["hubert", "whisper"]]


def test_encoders_of_one_content_under_two_names_make_one_pool() -> None:
    points = list(space({POOL: {"subsets": {"of": ["tiny_a", "tiny_b"], "sizes": [1, 2]}}}, base="paper").points())
    assert [point[POOL] for point in points] == [["tiny_a"], ["tiny_a", "tiny_b"]]


def test_a_pool_of_twins_has_members_with_names_of_their_own() -> None:
    study = space({POOL: {"repeats": {"of": ["hubert", "new"], "times": [2]}}}, encoders={"new": {"checkpoint": "a/b"}})
    hubert, new = (study.config(point).model.weak_encoders for point in study.points())
    assert [member.name for member in hubert] == ["hubert_1", "hubert_2"]
    assert hubert[0].train == "full"
    assert hubert[0].checkpoint == hubert[1].checkpoint
    assert [(member.name, member.checkpoint) for member in new] == [("new_1", "a/b"), ("new_2", "a/b")]


def test_a_grid_is_the_product_of_its_entries_without_what_is_refused() -> None:
    entries = {POOL: {"subsets": {"sizes": [1, 2, 3]}}, "model.router.top_k": {"int": [1, 3]}}
    pools = [list(point[POOL]) for point in space({POOL: entries[POOL]}).points()]
    brute = [(pool, k) for pool, k in product(pools, (1, 2, 3)) if k <= len(pool)]
    study = space(entries, constraints=["model.router.top_k <= pool_size"])
    assert [(point[POOL], point["model.router.top_k"]) for point in study.points()] == brute
    assert study.rejection({POOL: ["hubert"], "model.router.top_k": 2}) == "against model.router.top_k <= pool_size"
    # The configuration itself refuses them too, and says why.
    assert "is more than the 1 weak encoders" in str(
        space(entries).rejection({POOL: ["hubert"], "model.router.top_k": 2})
    )


def test_settings_set_several_keys() -> None:
    study = space({"routers": {"settings": {"one": {"model.router.data_dependent": False}, "none": {POOL: []}}}})
    one, none = (study.config(point) for point in study.points())
    assert (one.model.router.data_dependent, len(one.model.weak_encoders)) == (False, 3)
    assert none.model.weak_encoders == []


def test_numbers_reach_the_configuration_unchanged() -> None:
    study = space({"training.learning_rate": {"choice": [1e-5, 0.1 + 0.2]}, "training.clip_norm": {"choice": [1]}})
    assert [study.config(point).training.learning_rate for point in study.points()] == [1e-5, 0.1 + 0.2]


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("a.b <= size", True),
        ("a.b * 2 == size + 1 and not x == 'no'", True),
        ("x in ['yes', 'maybe'] or size > 10", True),
        ("1 < a.b < size", True),
        ("a.b - 3 > 0", False),
        ("-a.b < -1", True),
        ("x not in ('yes',)", False),
    ],
)
def test_constraints_mean_what_python_means(text: str, truth: bool) -> None:
    values = {"a.b": 2, "size": 3, "x": "yes"}
    assert Constraint(text).holds(values.__getitem__) is truth
    assert eval(text.replace("a.b", "a_b"), {"a_b": 2, "size": 3, "x": "yes"}) is truth


@pytest.mark.parametrize("text", ["f(x)", "x[0]", "lambda: 1", "[y for y in x]", "x if y else z", "x ** 9", "(x := 1)"])
def test_constraints_hold_no_code(text: str) -> None:
    with pytest.raises(ValueError, match="may hold names, numbers, text, comparisons"):
        Constraint(text)


def test_a_constraint_sees_defaults_settings_and_entries(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "{name: s, question: Why, space: {routers: {settings: {both: {}, one: {model.router.data_dependent: false}}},"
        " training.clip_norm: {choice: [1.0, 2.0]}},"
        " constraints: ['routers == \"both\" or training.clip_norm == model.router.temperature']}"
    )
    points = [tuple(point.values()) for point in SearchSpace(load_sweep(file)).points()]
    assert points == [("both", 1.0), ("both", 2.0), ("one", 1.0)]
