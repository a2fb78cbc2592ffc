"""What the shipped presets promise."""

import re
from importlib import resources

import pytest

from mowe_ray.config import load_config, preset_names
from mowe_ray.config.fields import InlineConfig

MARK = re.compile(r"# (paper|assumption|borrowed: \w+|ours)\b")


def preset_text(name: str) -> str:
    return (resources.files("mowe_ray.config") / "presets" / f"{name}.yaml").read_text()


def test_names() -> None:
    assert preset_names() == ["paper", "paper_baseline", "paper_uniform", "quickstart"]


@pytest.mark.parametrize("name", preset_names())
def test_loads_without_warnings_under_its_own_name(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.warnings() == []


def test_quickstart_needs_nothing_from_outside() -> None:
    config = load_config("quickstart")
    checkpoints = [
        config.model.base_encoder,
        config.model.language_model,
        *(member.checkpoint for member in config.model.weak_encoders),
    ]
    assert all(isinstance(checkpoint, InlineConfig) for checkpoint in checkpoints)
    sources = [*config.data.train, *config.data.validation]
    assert all(source.path.startswith("builtin:") for source in sources)
    assert config.compute.gpus_per_worker == 0


@pytest.mark.parametrize("name", ["paper", "paper_baseline", "paper_uniform"])
def test_every_value_of_the_paper_presets_says_whose_it_is(name: str) -> None:
    for line in preset_text(name).splitlines():
        code = line.partition("#")[0].rstrip()
        sets_value = re.search(r": \S", code) and not code.startswith(("name:", "preset:"))
        if sets_value:
            assert MARK.search(line), line


def test_paper_presets_differ_in_the_pool_only() -> None:
    paper, baseline, uniform = (load_config(name).model_dump() for name in ("paper", "paper_baseline", "paper_uniform"))
    for config in (paper, baseline, uniform):
        del config["name"]
    pools = [config["model"].pop("weak_encoders") for config in (paper, baseline, uniform)]
    assert paper == baseline == uniform
    assert [len(pool) for pool in pools] == [4, 0, 4]
    assert {member["checkpoint"] for member in pools[2]} == {"openai/whisper-tiny"}
