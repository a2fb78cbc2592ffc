"""What is shipped beside the code can be read by it."""

import tomllib
from pathlib import Path

import pytest
import yaml

from mowe_ray.config import load_config

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "mowe_ray" / "config" / "presets").iterdir())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_loads_by_name_and_by_path(path: Path) -> None:
    assert path.suffix == ".yaml"
    assert load_config(path.stem) == load_config(path)
    yaml.safe_load(path.read_text())  # also for readers that are not ours


def test_presets_and_type_marker_are_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["mowe_ray"] == [
        "py.typed",
        "config/presets/*.yaml",
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
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
