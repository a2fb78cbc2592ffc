"""Encoders that are not known are refused before anything starts."""

import json
from pathlib import Path

import pytest

from mowe_ray.model.encoders import ENCODERS
from mowe_ray.train import main
from mowe_ray.training.clip_length import FAMILIES


def test_the_families_are_those_of_the_package() -> None:
    assert {name for name, family in ENCODERS.items() if family.__module__.startswith("mowe_ray.model.")} == FAMILIES


@pytest.mark.parametrize("family", ["bert", "strange"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_unknown_family_is_a_wrong_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, more: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    for key, label in (
        (f"model.base_encoder={{config: {{model_type: {family}}}}}", "model.base_encoder"),
        (f"model.weak_encoders.1.checkpoint={tmp_path}", "model.weak_encoders"),
    ):
        assert main(["--config", "quickstart", *more, f"storage={tmp_path}/runs", key]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(label)
        assert said.endswith("plugins: [FILE.py]")
        assert f"{family!r} is not supported; known families: audio-spec" in said
        assert "\n" not in said
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_a_configuration_is_a_wrong_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "quickstart", "--dry-run", f"model.base_encoder={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"model.base_encoder: cannot read a checkpoint from '{tmp_path}'")
