"""Encoders out of the checkpoint formats found on the hub."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mowe_ray.model.encoders import ENCODERS, AudioEncoder, load_encoder, read_config, same_weights
from mowe_ray.model.frontends import KaldiFbank, LogMel, NormalisedWave
from tests.tiny_models import (
    ENCODER_CONFIGS,
    save_encoder_checkpoint,
    tiny_ast_config,
    tiny_hubert_config,
    tiny_wav2vec2_config,
    tiny_whisper_config,
)

LEFT_OUT = (
    "masked_spec_embed",  # only transformers' own masking reads it
    *("adapter.", "proj.", "proj1.", "proj2.", "audio_bos_eos_token."),  # on the way to their own language model
)


def assert_holds(encoder: AudioEncoder, model: torch.nn.Module) -> None:
    """Every weight of the encoder, and no fewer, comes from the model's own encoder."""
    inside = next(m for m in model.modules() if isinstance(m, encoder.model_class)).state_dict()
    inside = {name: value for name, value in inside.items() if not name.removeprefix("prenet.").startswith(LEFT_OUT)}
    loaded = encoder.model.state_dict()
    assert loaded.keys() == inside.keys()
    assert all(torch.equal(loaded[name], inside[name].float()) for name in loaded)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sharded_model_with_a_head(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = save_encoder_checkpoint(tmp_path, ENCODER_CONFIGS[family](), dtype=dtype)
    assert (tmp_path / "model.safetensors.index.json").exists()
    encoder, _ = load_encoder(str(tmp_path))
    assert_holds(encoder, model)


@pytest.mark.parametrize(
    ("family", "model_class"),
    [
        ("whisper", "WhisperModel"),
        ("whisper", "WhisperForAudioClassification"),
        ("hubert", "HubertModel"),
        ("hubert", "HubertForCTC"),
        ("wav2vec2", "Wav2Vec2ForPreTraining"),
        ("wavlm", "WavLMForXVector"),
        ("audio-spectrogram-transformer", "ASTModel"),
    ],
)
def test_other_models_around_the_encoder(tmp_path: Path, family: str, model_class: str) -> None:
    config = ENCODER_CONFIGS[family]()
    model = save_encoder_checkpoint(tmp_path, config, model_class=model_class, shard_size="1GB")
    assert (tmp_path / "model.safetensors").exists()
    assert_holds(load_encoder(str(tmp_path))[0], model)


def test_bare_whisper_encoder(tmp_path: Path) -> None:
    model = WhisperEncoder(read_config(tiny_whisper_config()))
    model.save_pretrained(tmp_path)
    assert_holds(load_encoder(str(tmp_path))[0], model)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_layer_weights_of_a_classifier(tmp_path: Path, shard_size: str, pickled: bool) -> None:
    """As superb/hubert-base-superb-er: plain weights, and a learned sum over layers."""
    config = tiny_hubert_config(use_weighted_layer_sum=True)
    model = save_encoder_checkpoint(tmp_path, config, shard_size=shard_size)
    with torch.no_grad():
        model.layer_weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    if pickled:
        pickle_weights(tmp_path)
    encoder, extras = load_encoder(str(tmp_path))
    assert_holds(encoder, model)
    assert extras.layer_weights is not None
    assert extras.layer_weights.tolist() == [0.5, -1.0, 2.0]


def pickle_weights(folder: Path) -> None:
    """Rewrite a folder's weights as older checkpoints have them."""
    for path in folder.glob("*.safetensors"):
        new = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / new)
        path.unlink()
    for index in folder.glob("*.safetensors.index.json"):
        text = index.read_text().replace(".safetensors", ".bin").replace('"model-', '"pytorch_model-')
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


class Malicious:
    """Pickles into a call, as an attack would."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("owned"),)


def test_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_encoder_checkpoint(tmp_path / "hubert", tiny_hubert_config(), shard_size="1GB")
    pickle_weights(tmp_path / "hubert")
    torch.save({"layer_weights": Malicious()}, tmp_path / "hubert" / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        load_encoder(str(tmp_path / "hubert"))
    assert not Path("owned").exists()


def test_old_weight_norm_names(tmp_path: Path) -> None:
    """hub checkpoints of HuBERT and Wav2Vec2 store weight_g and weight_v."""
    model = save_encoder_checkpoint(tmp_path, tiny_hubert_config(), shard_size="1GB")
    rename(tmp_path, {"parametrizations.weight.original0": "weight_g"})
    rename(tmp_path, {"parametrizations.weight.original1": "weight_v"})
    assert any(name.endswith("weight_g") for name in load_file(tmp_path / "model.safetensors"))
    assert_holds(load_encoder(str(tmp_path))[0], model)


def test_missing_weights_are_named_never_random(tmp_path: Path) -> None:
    save_encoder_checkpoint(tmp_path, tiny_whisper_config(), shard_size="1GB")
    rename(tmp_path, {"encoder.layers.1.fc1": "encoder.layers.1.gone"})
    with pytest.raises(ValueError, match=r"lacks 2 weights of a whisper encoder: .*layers\.1\.fc1\.bias"):
        load_encoder(str(tmp_path))


def rename(folder: Path, parts: dict[str, str]) -> None:
    """Rename keys of a one-file checkpoint."""

    def new_name(name: str) -> str:
        for old, new in parts.items():
            name = name.replace(old, new)
        return name

    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    renamed = {new_name(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_front_ends_come_from_the_preprocessor(tmp_path: Path) -> None:
    cases = {
        "whisper": (tiny_whisper_config(), {"hop_length": 160}, LogMel(20)),
        "hubert": (tiny_hubert_config(), {"do_normalize": False}, NormalisedWave(False)),
        "ast": (tiny_ast_config(), {"mean": -5.0, "std": 3.0}, KaldiFbank(32, True, -5.0, 3.0)),
    }
    for name, (config, changes, expected) in cases.items():
        save_encoder_checkpoint(tmp_path / name, config)
        change_preprocessor(tmp_path / name, **changes)
        encoder, extras = load_encoder(str(tmp_path / name))
        assert encoder.front_end == expected
        assert changes.items() <= extras.preprocessor.items()


def test_without_a_preprocessor_the_family_decides(tmp_path: Path) -> None:
    save_encoder_checkpoint(tmp_path, tiny_wav2vec2_config(), preprocessor=False)
    encoder, extras = load_encoder(str(tmp_path))
    assert encoder.front_end == NormalisedWave(True)
    assert extras.preprocessor == {}


def test_another_sample_rate_is_refused(tmp_path: Path) -> None:
    save_encoder_checkpoint(tmp_path, tiny_hubert_config())
    change_preprocessor(tmp_path, sampling_rate=24_000)
    with pytest.raises(ValueError, match="expects audio at 24000 Hz"):
        load_encoder(str(tmp_path))


def change_preprocessor(folder: Path, **changes: object) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_random_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, extras = load_encoder(tiny_hubert_config(), seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert same_weights(first, load_encoder(tiny_hubert_config(), seed=1)[0])
    assert not same_weights(first, load_encoder(tiny_hubert_config(), seed=2)[0])
    assert extras.layer_weights is None


def test_errors_name_the_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read a checkpoint from .*nowhere"):
        load_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="an inline config needs model_type"):
        load_encoder({"d_model": 32})
