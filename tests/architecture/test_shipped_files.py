"""What is shipped beside the code can be read by it."""

import tomllib
from pathlib import Path

import pytest
import yaml

from mowe_ray.config import load_config
from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.one_shot import Supernet
from mowe_ray.sweeping.schema import POOL_KEY
from mowe_ray.sweeping.search import make_search
from mowe_ray.sweeping.search_space import SearchSpace

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "mowe_ray" / "config" / "presets").iterdir())
SWEEPS = sorted((ROOT / "sweeps").iterdir())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_loads_by_name_and_by_path(path: Path) -> None:
    assert path.suffix == ".yaml"
    assert load_config(path.stem) == load_config(path)
    yaml.safe_load(path.read_text())  # also for readers that are not ours


def test_the_shipped_studies_are_these() -> None:
    assert [path.name for path in SWEEPS] == [
        "aux_loss_weight.yaml",
        "base_features.yaml",
        "fusion.yaml",
        "joint.yaml",
        "oneshot.yaml",
        "pool_composition.yaml",
        "pool_size.yaml",
        "router_input.yaml",
        "routers.yaml",
        "top_k.yaml",
    ]


def made_supernet(space: SearchSpace) -> Supernet:
    score = {"asr": {"score": 0.5, "samples": 9}}
    return Supernet(0, {frozenset(point[POOL_KEY]): score for point in space.points()})


@pytest.mark.parametrize("base", ["quickstart", "paper"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_study_asks_a_question_and_has_points_to_answer_it(path: Path, base: str) -> None:
    sweep = load_sweep(path, [f"base={base}"])
    assert sweep.name == path.stem
    assert sweep.question.endswith("?")
    space = SearchSpace(sweep)
    supernets = [made_supernet(space)] if sweep.search.kind == "oneshot" else []
    search = make_search(
        space, ["max"], supernets
    )  # `sweep.objective.against` changes how points are compared, not which exist
    points = []
    while (point := search.next()) is not None and len(points) != sweep.budget.points:
        points.append(point)
    assert len(points) >= 2
    configs = [space.config(point) for point in points]  # a point that cannot be trained raises
    assert len({config.to_yaml() for config in configs}) == len(points)
    if sweep.scheduler.kind != "none":
        assert all(config.training.eval_every > 0 for config in configs)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_study_says_how_to_run_it_with_either_base(path: Path) -> None:
    opening = path.read_text().partition("name:")[0]
    assert opening.startswith("# ")
    assert opening.splitlines()[0].endswith("?")
    for line in ("", " --dry-run ", " base=paper"):
        assert f"python -m mowe_ray.sweep sweeps/{path.name}{line}" in opening


def test_presets_and_type_marker_are_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["mowe_ray"] == [
        "py.typed",
        "config/presets/*.yaml",
        "serving/page/*",
    ]
    assert (ROOT / "mowe_ray" / "py.typed").is_file()


def test_every_dependency_is_pinned() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["serve"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
