"""Families with a front-end of their own, against transformers' feature extractor and model on a padded batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig

from mowe_ray.model.encoders import load_encoder
from tests.tiny_models import ENCODER_CONFIGS, feature_extractor, tiny_language_model_config

LENGTHS = (16_000, 9_000, 5_555)
MASK_OF = {"audioflamingo3_encoder": "input_features_mask"}


@pytest.mark.parametrize("family", ["wav2vec2-bert", "parakeet_encoder", "audioflamingo3_encoder"])
def test_a_padded_batch_is_what_transformers_makes_of_it(family: str) -> None:
    config = ENCODER_CONFIGS[family](**({} if family != "audioflamingo3_encoder" else {"num_mel_bins": 128}))
    encoder = load_encoder(config)[0].eval()
    theirs = encoder.model_class(encoder.config).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    noise = np.random.default_rng(0)
    waves = [noise.normal(0, 0.1, length).astype(np.float32) for length in LENGTHS]
    inputs = feature_extractor(config)(waves, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    with torch.no_grad():
        output = theirs(
            inputs.input_features,
            **{MASK_OF.get(family, "attention_mask"): inputs.attention_mask},
            output_hidden_states=True,
        )
        wanted = [output.hidden_states[1], output.last_hidden_state]
        if family == "audioflamingo3_encoder":  # its hidden states come before the means of two frames
            wanted[0] = torch.nn.functional.avg_pool1d(wanted[0].transpose(1, 2), 2).transpose(1, 2)
        for padded in (encoder.pad_samples(max(LENGTHS), "bucket"), 48_000):
            wave = torch.zeros(3, max(LENGTHS))
            for row, clip in zip(wave, waves, strict=True):
                row[: len(clip)] = torch.from_numpy(clip)
            lengths = torch.tensor(LENGTHS)
            features = encoder.front_end(wave, lengths, padded)
            if family == "wav2vec2-bert":
                # Its extractor rounds means of logarithms to float32, which alone moves features by 1e-5: those first,
                # and then what the network makes of the extractor's own.
                shared = inputs.input_features.shape[1]
                torch.testing.assert_close(features[:, :shared], inputs.input_features, atol=2e-5, rtol=1e-5)
                features[:, :shared] = inputs.input_features
            states = encoder(features, all_layers=True, lengths=lengths)
            for row, length in enumerate(LENGTHS):
                frames = encoder.num_frames(length)
                for ours, expected in zip((states[1], states[-1]), wanted, strict=True):
                    torch.testing.assert_close(ours[row, :frames], expected[row, :frames], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_audio", "parakeet_ctc"])
def test_the_encoder_inside_a_larger_model_is_found(tmp_path: Path, family: str) -> None:
    """Of a speech recogniser and of an audio language model: its configuration, and its weights alone."""
    if family == "parakeet_ctc":
        config = {"model_type": family, "encoder_config": ENCODER_CONFIGS["parakeet_encoder"](), "vocab_size": 16}
        model = transformers.ParakeetForCTC(AutoConfig.for_model(**config, pad_token_id=0))
        inside = model.encoder
    else:
        text = tiny_language_model_config("qwen2")
        config = {"model_type": family, "audio_config": ENCODER_CONFIGS["qwen2_audio_encoder"](), "text_config": text}
        model = transformers.Qwen2AudioForConditionalGeneration(AutoConfig.for_model(**config))
        inside = model.model.audio_tower
    model.save_pretrained(tmp_path)
    encoder, _ = load_encoder(str(tmp_path))
    assert encoder.config.model_type == inside.config.model_type
    loaded = encoder.model.state_dict()
    assert loaded.keys() == inside.state_dict().keys()
    assert all(torch.equal(weight, loaded[name]) for name, weight in inside.state_dict().items())
