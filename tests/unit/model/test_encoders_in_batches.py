"""Families with a front-end of their own, against transformers' feature extractor and model on a padded batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig

from mowe_ray.model.encoders import load_encoder
from mowe_ray.model.frontends import resample
from tests.tiny_models import (
    ENCODER_CONFIGS,
    feature_extractor,
    save_encoder_checkpoint,
    tiny_language_model_config,
)

LENGTHS = (16_000, 9_000, 5_555)
CASES = {
    "wav2vec2-bert": ({}, LENGTHS),
    "parakeet_encoder": ({}, LENGTHS),
    "audioflamingo3_encoder": ({"num_mel_bins": 128}, LENGTHS),
    "voxtral_encoder": ({}, LENGTHS),
    "glmasr_encoder": ({}, LENGTHS),
    "qwen3_asr_encoder": ({}, (40_000, 17_000, 5_555)),  # of several windows of attention
    "clap_audio_model": ({}, LENGTHS),
    "moss_transcribe_diarize_audio": ({}, LENGTHS),
    "seamless_m4t": ({}, LENGTHS),
    "seamless_m4t_v2": ({}, LENGTHS),
    "lasr_encoder": ({}, LENGTHS),
    "fun_asr_nano_encoder": ({}, LENGTHS),
    "qwen3_omni_moe_audio_encoder": ({}, (40_000, 17_000, 5_555)),
    "qwen2_5_omni_audio_encoder": ({}, (40_000, 17_000, 5_555)),
}
FIXED = (
    "voxtral_encoder",
    "glmasr_encoder",
    "moss_transcribe_diarize_audio",
)  # transformers knows 30 s alone, without a mask: padding is a part of it
NAMES = dict.fromkeys(("audioflamingo3_encoder", "qwen3_asr_encoder", "fun_asr_nano_encoder"), "input_features_mask")
OMNI = ("qwen3_omni_moe_audio_encoder", "qwen2_5_omni_audio_encoder")  # clips one behind the other, without padding
# Extractors that round what they normalise to float32, which alone moves features by 1e-5.
ROUNDED = ("wav2vec2-bert", "seamless_m4t", "seamless_m4t_v2", "fun_asr_nano_encoder")


def inputs_of(config: dict[str, Any], waves: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """What the feature extractor of transformers makes of clips, by the names of its model's arguments."""
    family = config["model_type"]
    if family == "clap_audio_model":
        waves = [resample(torch.from_numpy(wave)[None], 48_000)[0].numpy() for wave in waves]
        return {"input_features": feature_extractor(config)(waves, return_tensors="pt").input_features}
    made = feature_extractor(config)(waves, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    if family in OMNI:
        own = made.attention_mask.sum(1)
        mel = [features[:, :count] for features, count in zip(made.input_features, own, strict=True)]
        return {"input_features": torch.cat(mel, 1), "feature_lens": own}
    masks = (
        {}
        if family in FIXED
        else {
            NAMES.get(family, "attention_mask"): made[
                "attention_mask" if "attention_mask" in made else "input_features_mask"
            ]
        }
    )
    return {"input_features": made.input_features, **masks}


def states_of(family: str, output: Any, lengths: Sequence[int]) -> list[torch.Tensor]:
    """A middle layer and the last one of transformers, as (C, T, D)."""
    first = 2 if family == "fun_asr_nano_encoder" else 1  # its first layer changes the width
    middle, last = output.hidden_states[first], output.last_hidden_state
    if family == "audioflamingo3_encoder":  # its hidden states come before the means of two frames
        middle = torch.nn.functional.avg_pool1d(middle.transpose(1, 2), 2).transpose(1, 2)
    if family == "qwen3_asr_encoder":  # all clips in one sequence, none below half a second
        own = [(mel // 100) * 13 + -(-(mel % 100) // 8) for mel in (-(-max(n, 8_000) // 160) for n in lengths)]
        middle, last = (torch.nn.utils.rnn.pad_sequence(state.split(own), batch_first=True) for state in (middle, last))
    if family in OMNI:
        mel = [-(-length // 160) for length in lengths]
        if family == "qwen2_5_omni_audio_encoder":  # its hidden states come before the means of two frames
            parts = middle.split([-(-count // 2) for count in mel])
            middle = torch.cat([part[: len(part) // 2 * 2].unflatten(0, (-1, 2)).mean(1) for part in parts])
            own = [-(-count // 2) // 2 for count in mel]
        else:
            own = [count // 100 * 13 + -(-(count % 100) // 8) for count in mel]
        middle, last = (torch.nn.utils.rnn.pad_sequence(state.split(own), batch_first=True) for state in (middle, last))
    if family == "clap_audio_model":  # the spectrogram in eight pieces of 16 columns, one below the other
        middle = middle.unflatten(2, (8, -1)).mean(3).flatten(2).transpose(1, 2)
        last = last.mean(2).transpose(1, 2)
    return [middle, last]


@pytest.mark.parametrize("family", CASES)
def test_a_padded_batch_is_what_transformers_makes_of_it(family: str) -> None:
    changes, lengths = CASES[family]
    config = ENCODER_CONFIGS[family](**changes)
    encoder = load_encoder(config)[0].eval()
    theirs = encoder.model_class(encoder.config).eval()
    for name in getattr(encoder, "to_language_model", ()):
        setattr(theirs, name, torch.nn.Identity())
    theirs.load_state_dict(encoder.model.state_dict())
    noise = np.random.default_rng(0)
    waves = [noise.normal(0, 0.1, length).astype(np.float32) for length in lengths]
    inputs = inputs_of(config, waves)
    with torch.no_grad():
        wanted = states_of(family, theirs(**inputs, output_hidden_states=True), lengths)
        for padded in (480_000,) if family in FIXED else (encoder.pad_samples(max(lengths), "bucket"), 480_000):
            for rows in ([0, 1, 2], [1]):
                valid = torch.tensor([lengths[row] for row in rows])
                clips = [torch.from_numpy(waves[row]) for row in rows]
                wave = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
                features = encoder.front_end(wave, valid, padded)
                if family in ROUNDED:  # those first, and then what the network makes of the extractor's own
                    shared = inputs["input_features"][rows]
                    frames = shared.shape[1]
                    close = (
                        1e-3 if family == "fun_asr_nano_encoder" else 2e-5
                    )  # an extractor in float32: of little, few digits
                    torch.testing.assert_close(features[:, :frames], shared, atol=close, rtol=1e-5)
                    features[:, :frames] = shared
                states = encoder(features, all_layers=True, lengths=valid)
                for ours, expected in zip(
                    (states[1 if family != "clap_audio_model" else 0], states[-1]), wanted, strict=True
                ):
                    for place, row in enumerate(rows):
                        count = encoder.num_frames(lengths[row])
                        torch.testing.assert_close(ours[place, :count], expected[row, :count], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family", ["speech_to_text", "granite_speech_encoder", "granite_speech_plus_encoder", "voxtral_realtime_encoder"]
)
def test_a_clip_in_a_padded_batch_is_what_transformers_makes_of_it_alone(family: str) -> None:
    """Families that transformers runs on padding as well, or without a mask."""
    config = ENCODER_CONFIGS[family]()
    encoder = load_encoder(config)[0].eval()
    theirs = encoder.model_class(encoder.config).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    noise = np.random.default_rng(0)
    waves = [noise.normal(0, 0.1, length).astype(np.float32) for length in LENGTHS]
    valid = torch.tensor(LENGTHS)
    wave = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in waves], batch_first=True)
    for padded in (encoder.pad_samples(max(LENGTHS), "bucket"), 480_000):
        with torch.no_grad():
            together = encoder(encoder.front_end(wave, valid, padded), all_layers=True, lengths=valid)
        for row, clip in enumerate(waves):
            options = {} if "granite" in family else {"sampling_rate": 16_000, "return_tensors": "pt"}
            if family == "voxtral_realtime_encoder":  # silence for the last window of the spectrogram
                clip = np.pad(clip, (0, 400))
            features = feature_extractor(config)([torch.from_numpy(clip)] if not options else clip, **options)
            with torch.no_grad():
                output = theirs(features["input_features"], output_hidden_states=True)
            count = encoder.num_frames(LENGTHS[row])
            for ours, expected in ((together[1], output.hidden_states[1]), (together[-1], output.last_hidden_state)):
                torch.testing.assert_close(ours[row, :count], expected[0, :count], atol=1e-5, rtol=1e-5)


def test_clips_beyond_the_window_of_clap_are_cut_into_windows() -> None:
    """Each of which is what transformers makes of that part alone."""
    config = ENCODER_CONFIGS["clap_audio_model"]()
    encoder = load_encoder(config)[0].eval()
    wave = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (1, 192_000)).astype(np.float32))
    length = torch.tensor([192_000])
    padded = encoder.pad_samples(192_000, "bucket")
    assert padded == 320_000
    with torch.no_grad():
        frames = encoder(encoder.front_end(wave, length, padded), lengths=length)
        sound = resample(wave, 48_000)[0].numpy()
        inputs = feature_extractor(config)([sound[:480_000], sound[480_000:]], return_tensors="pt")
        wanted = encoder.model(inputs.input_features).last_hidden_state.mean(2).transpose(1, 2)
    torch.testing.assert_close(frames, wanted.flatten(0, 1)[None], atol=1e-5, rtol=1e-5)
    assert encoder.num_frames(192_000) == 128 + 25


LARGER = {
    "parakeet_ctc": ("ParakeetForCTC", "encoder", {"pad_token_id": 0, "vocab_size": 16}),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", "model.audio_tower", {"text": "qwen2"}),
    "voxtral": ("VoxtralForConditionalGeneration", "model.audio_tower", {"text": "llama"}),
    "glmasr": ("GlmAsrForConditionalGeneration", "model.audio_tower", {"text": "llama"}),
    "qwen3_asr": ("Qwen3ASRForConditionalGeneration", "model.audio_tower", {"text": "qwen3"}),
    "clap": ("ClapModel", "audio_model", {"projection_dim": 16}),
    "lasr_ctc": ("LasrForCTC", "encoder", {"pad_token_id": 0, "vocab_size": 16}),
}
ENCODER_OF = {"clap": "clap_audio_model"}


@pytest.mark.parametrize("family", LARGER)
def test_the_encoder_inside_a_larger_model_is_found(tmp_path: Path, family: str) -> None:
    """Of speech recognisers, audio language models and CLAP: its configuration, and its weights alone."""
    name, place, options = LARGER[family]
    options = dict(options)
    text = options.pop("text", None)
    encoder_config = ENCODER_CONFIGS[ENCODER_OF.get(family, f"{family.removesuffix('_ctc')}_encoder")]()
    config = {"model_type": family, "encoder_config" if family.endswith("_ctc") else "audio_config": encoder_config}
    if text is not None:
        config |= {"text_config": tiny_language_model_config(text)}
    if family == "clap":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config |= {"text_config": sizes | {"vocab_size": 32}}
    model = getattr(transformers, name)(AutoConfig.for_model(**config, **options))
    model.save_pretrained(tmp_path)
    encoder, _ = load_encoder(str(tmp_path))
    inside = model.get_submodule(place)
    assert encoder.config.model_type == inside.config.model_type
    loaded = encoder.model.state_dict()
    assert loaded.keys() == inside.state_dict().keys()
    assert all(torch.equal(weight, loaded[name]) for name, weight in inside.state_dict().items())


def test_a_clap_that_fuses_hears_short_clips_alike(tmp_path: Path) -> None:
    """The weights for longer ones are left out; its mel bands are others, as its extractor makes them."""
    config = ENCODER_CONFIGS["clap_audio_model"](enable_fusion=True, fusion_type="aff_2d")
    theirs = save_encoder_checkpoint(tmp_path, config).eval()
    encoder = load_encoder(str(tmp_path))[0].eval()
    wave = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, 30_000).astype(np.float32))[None]
    inputs = feature_extractor(config)(resample(wave, 48_000)[0].numpy(), return_tensors="pt").input_features
    length = torch.tensor([30_000])
    features = encoder.front_end(wave, length, encoder.pad_samples(30_000, "bucket"))
    torch.testing.assert_close(features, inputs[:, :1], atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        wanted = theirs.audio_model(inputs, is_longer=torch.zeros(1, 1)).last_hidden_state.mean(2).transpose(1, 2)
        torch.testing.assert_close(encoder(features, lengths=length), wanted, atol=1e-5, rtol=1e-5)
