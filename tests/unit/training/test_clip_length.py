"""Encoders that are not known are refused before anything starts."""

import json
from pathlib import Path

import pytest

from mowe_ray.config.model_section import ModelSection
from mowe_ray.model.encoders import ENCODERS
from mowe_ray.train import main
from mowe_ray.training.clip_length import FAMILIES, check_clip_length
from tests.tiny_models import ENCODER_CONFIGS


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


def test_an_unknown_language_model_is_a_wrong_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "strange"}')
    for source in (str(tmp_path), "{config: {model_type: strange}}"):
        assert main(["--config", "quickstart", "--dry-run", f"model.language_model={source}"]) == 2
        assert "model.language_model" in (said := capsys.readouterr().err)
        assert "model_type 'strange' is unknown" in said


def test_a_folder_without_a_configuration_is_a_wrong_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "quickstart", "--dry-run", f"model.base_encoder={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"model.base_encoder: cannot read a checkpoint from '{tmp_path}'")


@pytest.mark.parametrize("family", ["whisper", "qwen2_audio_encoder", "voxtral_encoder", "glmasr_encoder"])
def test_clips_are_as_long_as_the_encoder_has_positions(tmp_path: Path, family: str) -> None:
    """Alone, and as a part of an audio language model."""
    encoder = ENCODER_CONFIGS[family]()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any", "audio_config": encoder}))
    for source in ({"config": encoder}, str(tmp_path)):
        model = ModelSection(base_encoder=source, language_model="x/y")
        check_clip_length(model, 30.0)
        with pytest.raises(ValueError, match=r"31 s is more than the 30 s that model.base_encoder takes"):
            check_clip_length(model, 31.0)
