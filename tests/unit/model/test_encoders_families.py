"""What single encoder families do beyond the shared contract."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from mowe_ray.model.encoders import encoder_class, load_encoder, same_weights
from tests.tiny_models import (
    feature_extractor,
    tiny_ast_config,
    tiny_hubert_config,
    tiny_voxtral_config,
    tiny_wav2vec2_config,
    tiny_whisper_config,
)

SECOND = 16_000


@pytest.mark.parametrize("config", [tiny_whisper_config(), tiny_voxtral_config()], ids=["whisper", "voxtral"])
def test_whisper_equals_transformers_bit_for_bit_at_30_s(config: dict[str, Any]) -> None:
    encoder, _ = load_encoder(config)
    encoder.eval()
    features = torch.randn(2, 20, 3000)
    theirs = encoder.model(features, output_hidden_states=True)
    assert torch.equal(encoder(features), theirs.last_hidden_state)
    for ours, expected in zip(encoder(features, all_layers=True), theirs.hidden_states, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("seconds", "padded"),
    [(0.1, 5.0), (2.44, 5.0), (2.45, 7.5), (10.0, 15.0), (27.44, 30.0), (29.0, 30.0), (30.0, 30.0)],
)
def test_whisper_buckets(seconds: float, padded: float) -> None:
    encoder, _ = load_encoder(tiny_whisper_config())
    assert encoder.pad_samples(round(seconds * SECOND), "bucket") == padded * SECOND
    assert encoder.pad_samples(round(seconds * SECOND), "full30") == 30 * SECOND


def test_whisper_with_fewer_positions_names_the_key_to_change() -> None:
    encoder, _ = load_encoder(tiny_whisper_config(max_source_positions=400))
    assert encoder.pad_samples(6 * SECOND, "bucket") == encoder.pad_samples(1, "full30") == 8 * SECOND
    assert encoder(torch.zeros(1, 20, 800)).shape[1] == 400
    with pytest.raises(ValueError, match=r"8\.50 s .* 8\.00 s .*data\.max_duration_s"):
        encoder.pad_samples(round(8.5 * SECOND), "bucket")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"feat_extract_norm": "layer"}])
def test_wave_encoders_equal_transformers(changes: dict[str, str]) -> None:
    encoder, _ = load_encoder(tiny_wav2vec2_config(**changes))
    encoder.eval()
    wave = torch.randn(1, SECOND)
    theirs = encoder.model(wave, output_hidden_states=True)
    assert torch.equal(encoder(wave), theirs.last_hidden_state)
    assert torch.equal(encoder(wave, all_layers=True)[1], theirs.hidden_states[1])


def test_padding_does_not_change_a_masked_clip() -> None:
    """With layer normalisation and a mask, a clip is the same at any padded length."""
    config = tiny_wav2vec2_config(feat_extract_norm="layer", do_stable_layer_norm=True)
    encoder, _ = load_encoder(config)
    encoder.eval()
    wave, length = torch.randn(1, 9_000), torch.tensor([9_000])
    alone = encoder(encoder.front_end(wave, length, 9_000))
    padded = encoder(encoder.front_end(wave, length, 30_000), lengths=length)
    frames = encoder.num_frames(9_000)
    torch.testing.assert_close(padded[:, :frames], alone, atol=1e-5, rtol=1e-4)


def test_a_masked_clip_below_one_frame_still_has_its_own_frame() -> None:
    config = tiny_wav2vec2_config(feat_extract_norm="layer", do_stable_layer_norm=True)
    encoder, _ = load_encoder(config)
    encoder.eval()
    wave, length = torch.randn(1, 300), torch.tensor([300])
    alone = encoder(encoder.front_end(wave, length, encoder.min_samples))
    padded = encoder(encoder.front_end(wave, length, 5_000), lengths=length)
    torch.testing.assert_close(padded[:, :1], alone, atol=1e-5, rtol=1e-4)


def test_frozen_convolutions_of_a_trained_wave_encoder_build_no_graph() -> None:
    encoder, _ = load_encoder(tiny_hubert_config())
    encoder.model.feature_extractor.requires_grad_(False)
    seen = []
    encoder.model.feature_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert encoder.train()(torch.randn(1, SECOND)).requires_grad
    assert not seen[0].requires_grad


def test_ast_equals_transformers_within_one_window() -> None:
    config = tiny_ast_config()
    encoder, _ = load_encoder(config)
    encoder.eval()
    features = torch.randn(1, 64, 32)
    hidden = encoder.model(features).last_hidden_state[:, 2:]
    rows, columns = 2, 5  # (32 - 16) // 10 + 1 patches in frequency, (64 - 16) // 10 + 1 in time
    by_hand = [hidden[:, [row * columns + t for row in range(rows)]].mean(1) for t in range(columns)]
    torch.testing.assert_close(encoder(features), torch.stack(by_hand, dim=1))


def test_ast_from_the_wave_equals_transformers_whatever_the_padding() -> None:
    """Its extractor fills the window with frames that are 0 before normalisation."""
    config = tiny_ast_config()
    encoder, _ = load_encoder(config)
    encoder.eval()
    wave, length = 0.1 * torch.randn(1, 5_000), torch.tensor([5_000])
    theirs = feature_extractor(config)(wave[0].numpy(), sampling_rate=SECOND, return_tensors="pt")
    hidden = encoder.model(theirs.input_values).last_hidden_state[:, 2:]
    expected = hidden.unflatten(1, (2, 5)).mean(1)[:, : encoder.num_frames(5_000)]
    for padded in (5_000, 9_000):
        frames = encoder(encoder.front_end(wave, length, padded))[:, : expected.shape[1]]
        torch.testing.assert_close(frames, expected, atol=1e-4, rtol=1e-4)


def test_ast_windows_of_a_long_clip_are_evenly_spaced() -> None:
    """Window w starts where patch column w * columns starts: none is lost, none comes twice."""
    encoder, _ = load_encoder(tiny_ast_config())
    encoder.eval()
    features = torch.randn(2, 150, 32)
    frames = encoder(features)
    assert frames.shape[1] == (150 - 16) // 10 + 1
    second_window = encoder(features[:, 50:114])
    torch.testing.assert_close(frames[:, 5:10], second_window)


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'bert' is not supported; known families: .*hubert.*whisper"):
        encoder_class(AutoConfig.for_model("bert"))


@pytest.mark.parametrize("family", ["bert", "strange"])
def test_an_unknown_family_is_told_in_one_line(tmp_path: Path, family: str) -> None:
    """Of an inline configuration and of a folder, whether transformers knows it or not."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    for source in ({"model_type": family}, str(tmp_path)):
        with pytest.raises(ValueError, match=rf"^encoder family '{family}' is not .*whisper.*plugins: \[FILE.py\]$"):
            load_encoder(source)


def test_same_weights() -> None:
    first, _ = load_encoder(tiny_hubert_config(), seed=1)
    again, _ = load_encoder(tiny_hubert_config(), seed=1)
    other, _ = load_encoder(tiny_hubert_config(), seed=2)
    wider, _ = load_encoder(tiny_hubert_config(intermediate_size=72), seed=1)
    wav2vec2, _ = load_encoder(tiny_wav2vec2_config(), seed=1)
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert not same_weights(first, wider)
    assert not same_weights(first, wav2vec2)


def test_text_alignment_adapters_are_left_out() -> None:
    """A checkpoint with transformers' strided adapter still gives 50 frames per second."""
    config = tiny_wav2vec2_config(add_adapter=True, num_adapter_layers=1)
    encoder, _ = load_encoder(config)
    assert AutoModel.from_config(AutoConfig.for_model(**config)).adapter is not None
    assert encoder(torch.randn(1, SECOND)).shape[1] == encoder.num_frames(SECOND) == 49
