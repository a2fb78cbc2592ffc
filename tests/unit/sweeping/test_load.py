"""Reading sweep files, and the wording of errors."""

from pathlib import Path

import pytest
import yaml

from mowe_ray.config import ConfigError
from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.search_space import SearchSpace

MINIMAL = {"name": "s", "question": "Why?", "space": {"model.router.top_k": {"choice": [1, 2]}}}


def write(folder: Path, **keys: object) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | keys))
    return path


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        SearchSpace(load_sweep(path, overrides))
    return str(caught.value)


def test_overrides_are_keys_of_the_sweep_or_of_every_trial(tmp_path: Path) -> None:
    path = write(tmp_path, set={"training.epochs": 2}, set_for={"paper": {"training.epochs": 9}})
    sweep = load_sweep(path, ["search.seed=7", "seeds=[1, 2]", "training.learning_rate=1e-2", "data.train.0.weight=2"])
    assert (sweep.search.seed, sweep.seeds) == (7, [1, 2])
    base = SearchSpace(sweep).base
    assert (base.training.epochs, base.training.learning_rate, base.data.train[0].weight) == (2, 0.01, 2)
    paper = SearchSpace(load_sweep(path, ["base=paper", "training.learning_rate=1e-2"])).base
    assert (paper.name, paper.training.epochs, paper.training.learning_rate) == ("paper", 9, 0.01)


def test_entries_of_the_space_have_dots_in_their_names(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path), ["space.model.router.top_k={choice: [3]}", "set.training.epochs=1"])
    assert sweep.space["model.router.top_k"].choice == [3]
    assert sweep.set == {"training.epochs": 1}


def test_a_base_beside_the_sweep_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("preset: quickstart\ntraining: {clip_norm: 3}\n")
    assert SearchSpace(load_sweep(write(tmp_path, base="mine.yaml"))).base.training.clip_norm == 3


@pytest.mark.parametrize(
    ("keys", "overrides", "told"),
    [
        ({"serach": {}}, [], "serach: unknown key (did you mean search?)"),
        ({"search": {"knd": "grid"}}, [], "search.knd: unknown key (did you mean kind?)"),
        (
            {},
            ["scheduler.kind=asa"],
            "scheduler.kind: must be 'none', 'asha', 'hyperband', 'median' or 'pbt', got 'asa'",
        ),
        ({}, ["serach.kind=random"], "serach.kind: unknown key (did you mean search.kind?)"),
        ({}, ["training.epoch=2"], "training.epoch: unknown key (did you mean training.epochs?)"),
        ({}, ["training.epochs"], "training.epochs: expected key=value"),
        ({"set": {"training.epoch": 2}}, [], "set.training.epoch: training.epoch: unknown key"),
        ({"set": {"seed": 2}}, [], "set.seed: is decided by seeds"),
        ({"space": {"model.router.topk": {"choice": [1]}}}, [], "did you mean model.router.top_k?"),
        ({"space": {"x": {"settings": {"a": {"model.fusoin": "x"}}}}}, [], "did you mean model.fusion?"),
        ({"space": {"training.clip_norm": {"uniform": [0, 1]}}}, [], "a grid cannot hold a range"),
        ({"space": {"training.clip_norm": {"loguniform": [0, 1]}}}, [], "must be greater than 0"),
        (
            {"space": {"training.clip_norm": {"uniform": [2, 1]}}, "search": {"kind": "random"}},
            [],
            "budget.points: random",
        ),
        ({}, ["search.kind=optuna", "budget.points=3", "space.model.fusion={grid: [routed]}"], "write choice instead"),
        ({"space": {"model.weak_encoders": {"subsets": {"of": ["huberd"], "sizes": [1]}}}}, [], "no encoder 'huberd'"),
        ({"space": {"model.router.top_k": {"subsets": {"sizes": [1]}}}}, [], "are for model.weak_encoders"),
        ({"constraints": ["model.router.top_k <="]}, [], "is not an expression"),
        ({"constraints": ["pool_sise > 1"]}, [], "pool_sise in 'pool_sise > 1' is no key"),
        ({"constraints": ["__import__('os').system('true')"]}, [], "may hold names, numbers, text"),
        ({}, ["scheduler.kind=pbt"], "pbt needs search.kind random"),
        ({"base": "quikstart"}, [], "quikstart is neither a file nor a preset"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, keys: dict[str, object], overrides: list[str], told: str) -> None:
    assert told in problems(write(tmp_path, **keys), *overrides)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml is neither a file nor a study that is shipped: .*pool_size"):
        load_sweep(tmp_path / "nowhere.yaml")
