import os
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mowe_ray.config.model_section import ModelSection
from mowe_ray.config.training_section import MoweLossSection
from mowe_ray.data.cached_shards import CachedShard
from mowe_ray.data.decode import to_int16
from mowe_ray.data.micro_batch import Features
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.export import export
from mowe_ray.model.hidden_states import chosen_layers
from mowe_ray.training.build import assemble
from mowe_ray.training.collate import padded
from mowe_ray.training.frozen_features import (
    describe,
    encode_clips,
    encoder_key,
    frozen_encoders,
    load_frozen,
    origin_key,
)
from tests.tiny_models import (
    save_encoder_checkpoint,
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_whisper_config,
)

SEED = 3
SECONDS = (0.5, 3.0, 0.0, 1.0, 0.5, 2.4, 4.0)  # 0: text alone; Whisper pads the first ones to 5 s, the others to 7.5 s


@pytest.fixture
def make_section(tmp_path):
    """A base and two pool members with random weights, one of them trained, and one from a folder."""
    save_encoder_checkpoint(tmp_path / "whisper", tiny_whisper_config(d_model=16))

    def make(**changes: Any) -> ModelSection:
        values: dict[str, Any] = {
            "base_encoder": {"config": tiny_whisper_config()},
            "weak_encoders": [
                {"name": "folder", "checkpoint": str(tmp_path / "whisper"), "features": "weighted_sum"},
                {"name": "trained", "checkpoint": {"config": tiny_hubert_config()}, "train": "full"},
                {"name": "drawn", "checkpoint": {"config": tiny_hubert_config()}, "features": "layer:1"},
            ],
            "language_model": {"config": tiny_language_model_config("llama")},
        }
        return ModelSection.model_validate(values | changes)

    return make


def build(section: ModelSection, seed: int = SEED) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    return assemble(section, MoweLossSection(), seed=seed, tokenizer=tiny_tokenizer(False), gpu=False)


def keys(section: ModelSection, seed: int = SEED) -> dict[int, str]:
    frozen, _ = frozen_encoders(section)
    loaded = load_frozen(section, frozen, seed=seed, gpu=False)
    return {one.encoder_index: describe(loaded[one.encoder_index], one, section.pad_audio).key for one in frozen}


def origins(section: ModelSection, seed: int = SEED) -> list[str]:
    return [origin_key(section, one, seed=seed, gpu=False) for one in frozen_encoders(section)[0]]


@pytest.fixture
def audio() -> CachedShard:
    """Noise in the form of the cache."""
    random = np.random.default_rng(0)
    rows = [to_int16(random.uniform(-0.5, 0.5, round(16_000 * s)).astype(np.float32)) for s in SECONDS]
    samples = pa.array([wave.tobytes() for wave, _ in rows], pa.large_binary())
    lengths = pa.array([len(wave) for wave, _ in rows], pa.int32())
    return CachedShard(
        "unused", pa.table({"samples": samples, "length": lengths, "scale": [scale for _, scale in rows]})
    )


def encoded(encoder: Any, features: str, audio: CachedShard, batch_seconds: float = 60.0) -> dict[int, torch.Tensor]:
    batches = encode_clips(
        encoder,
        features,
        audio,
        pad_audio="bucket",
        device=torch.device("cpu"),
        batch_seconds=batch_seconds,
        max_batch_size=32,
    )
    pairs = [pair for rows, values in batches for pair in zip(rows, values, strict=True)]
    assert len(pairs) == sum(seconds > 0 for seconds in SECONDS)
    return {row: torch.from_numpy(values.copy()).view(torch.bfloat16) for row, values in pairs}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("exported", [False, True])
def test_encoders_alone_have_the_weights_they_have_in_the_model(make_section, tmp_path, exported, dtype):
    section = make_section(dtype=dtype)
    if exported:
        export(*build(section), tmp_path / "export")
        section = make_section(dtype=dtype, init_from=str(tmp_path / "export"))
    model, _ = build(section)
    encoders = model.audio_tower.encoders()
    features = ["last", "weighted_sum", "last", "layer:1"]
    found = keys(section)
    assert found == {place: encoder_key(encoders[place], features[place], "bucket") for place in (0, 1, 3)}
    if not exported:
        assert encoder_key(encoders[2], "last", "bucket") != encoder_key(encoders[3], "last", "bucket")


@pytest.mark.slow
def test_what_changes_the_features_changes_the_key(make_section, tmp_path):
    section = make_section()
    weak = section.model_dump()["weak_encoders"]
    before, origin = keys(section), origins(section)
    assert keys(make_section()) == before
    assert origins(make_section()) == origin
    assert len({*before.values()}) == len({*origin}) == 3

    def changed(other: ModelSection, seed: int = SEED) -> set[int]:
        after, then = keys(other, seed), origins(other, seed)
        places = {place for place in before if after[place] != before[place]}
        # A file that is touched is hashed again, but what is another encoder never passes for the old one.
        assert {place for place, a, b in zip(before, origin, then, strict=True) if a != b} >= places
        return places

    assert changed(section, seed=4) == {0, 3}  # what is drawn
    assert changed(make_section(pad_audio="full30")) == {0, 1, 3}
    assert changed(make_section(dtype="bfloat16")) == {0, 1, 3}
    assert changed(make_section(weak_encoders=[weak[0] | {"features": "last"}, *weak[1:]])) == {1}
    assert changed(make_section(weak_encoders=[weak[0], weak[1], weak[2] | {"features": "layer:2"}])) == {3}
    quiet = {"config": tiny_whisper_config(activation_function="relu")}
    assert changed(make_section(base_encoder=quiet)) == {0}
    save_encoder_checkpoint(tmp_path / "whisper", tiny_whisper_config(d_model=16), seed=1)
    assert changed(make_section()) == {1}


@pytest.mark.slow
def test_a_touched_checkpoint_is_hashed_again(make_section, tmp_path):
    before, origin = keys(make_section()), origins(make_section())
    os.utime(tmp_path / "whisper" / "config.json", ns=(1, 1))
    assert keys(make_section()) == before
    assert [a != b for a, b in zip(origin, origins(make_section()), strict=True)] == [False, True, False]


def test_what_is_trained_or_masked_is_told(make_section):
    frozen, lines = frozen_encoders(make_section(train_base="lora"))
    assert [one.label for one in frozen] == ["folder", "drawn"]
    assert [line.split()[1:4] for line in lines] == [["base_encoder", "is", "trained"], ["trained", "is", "trained"]]
    frozen, lines = frozen_encoders(make_section(spec_augment={}))
    assert [one.encoder_index for one in frozen] == [1, 3]
    assert "model.spec_augment masks the input of base_encoder" in lines[0]


@pytest.mark.slow
def test_features_are_those_in_float32_to_half_a_step_of_bfloat16(make_section, audio):
    """Against every clip alone, padded as the encoder pads it."""
    section = make_section()
    frozen, _ = frozen_encoders(section)
    loaded = load_frozen(section, frozen, seed=SEED, gpu=False)
    for one in frozen:
        encoder = loaded[one.encoder_index]
        for row, found in encoded(encoder, one.features, audio).items():
            wave, length = torch.from_numpy(audio.waves([row])[0])[None], torch.tensor([audio.lengths[row]])
            inputs = encoder.front_end(wave, length, encoder.pad_samples(int(length), "bucket"))
            exact = torch.stack(chosen_layers(encoder, one.features, inputs, length), 1)[0]
            exact = exact[:, : encoder.num_frames(int(length))]
            assert found.shape == exact.shape
            # 2^-9 is the rounding; the rest is for sums over a batch in another order, which near zero count more.
            assert ((found.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
            assert not torch.equal(found.float(), exact)


def test_features_do_not_depend_on_the_batch(make_section, audio):
    section = make_section()
    frozen, _ = frozen_encoders(section)
    encoder = load_frozen(section, frozen[:1], seed=SEED, gpu=False)[0]
    together, alone = encoded(encoder, "last", audio), encoded(encoder, "last", audio, batch_seconds=1.0)
    for row, features in together.items():
        difference = (features.float() - alone[row].float()).abs()
        assert (difference <= 2**-8 * features.float().abs() + 1e-6).all()


def test_padded_states_hold_each_clips_own_frames(make_section, audio):
    section = make_section()
    frozen, _ = frozen_encoders(section)
    member = frozen[1]
    features = encoded(load_frozen(section, [member], seed=SEED, gpu=False)[1], member.features, audio)
    rows = [3, 0, 6]
    values = [features[row].contiguous().view(torch.uint16).numpy().ravel() for row in rows]
    frames = [features[row].shape[1] for row in rows]
    states = padded(Features(1, 3, 16, frames, np.concatenate(values)))
    assert states.shape == (3, 3, max(frames), 16)
    for clip, row, count in zip(states, rows, frames, strict=True):
        assert torch.equal(clip[:, :count], features[row])
        assert not torch.any(clip[:, count:])
    assert padded(Features(1, 3, 16, [], np.zeros(0, np.uint16))).shape == (0, 3, 1, 16)
