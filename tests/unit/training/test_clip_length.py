"""Encoders that are not known are refused before anything starts."""

import json
from pathlib import Path

import pytest

from mowe_ray.config.model_section import ModelSection
from mowe_ray.model.encoders import ENCODERS
from mowe_ray.train import main
from mowe_ray.training.clip_length import FAMILIES, check_clip_length
from tests.tiny_models import ENCODER_CONFIGS, tiny_language_model_config, tiny_tokenizer


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


def test_an_encoder_is_no_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ENCODER_CONFIGS["hubert"]()))
    for source, family in (("{config: {model_type: whisper}}", "whisper"), (str(tmp_path), "hubert")):
        assert main(["--config", "quickstart", "--dry-run", f"model.language_model={source}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"model.language_model: {family!r} is an audio encoder, for model.base_encoder or")
    assert main(["--config", "quickstart", "--dry-run", "model.language_model={config: {model_type: t5}}"]) == 2
    assert capsys.readouterr().err.startswith("model.language_model: 't5' is not supported: a language model is")


def test_a_language_model_is_no_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_language_model_config("llama")))
    for source in ("{config: {model_type: llama}}", str(tmp_path)):
        assert main(["--config", "quickstart", "--dry-run", f"model.base_encoder={source}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("model.base_encoder: 'llama' is a language model, and belongs to model.language_model")


def test_folders_need_weights_and_the_tokenizer_of_their_own_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said_of(key: str) -> str:
        assert main(["--config", "quickstart", "--dry-run", f"{key}={tmp_path}"]) == 2
        return capsys.readouterr().err

    (tmp_path / "config.json").write_text(json.dumps(ENCODER_CONFIGS["hubert"]()))
    assert said_of("model.base_encoder").startswith(f"model.base_encoder: '{tmp_path}' has no weights (model.safe")
    (tmp_path / "config.json").write_text(json.dumps(tiny_language_model_config("llama", vocab_size=100)))
    (tmp_path / "model.safetensors").touch()
    assert said_of("model.language_model").startswith(f"model.language_model: '{tmp_path}' has no tokenizer")
    tiny_tokenizer(chat_template=False).save_pretrained(tmp_path)
    assert "the tokenizer of another model: 300 tokens for 100 of vocab_size" in said_of("model.language_model")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(tiny_language_model_config("llama")))
    assert said_of("model.language_model").startswith(f"model.language_model: '{tmp_path}' has no weights")
