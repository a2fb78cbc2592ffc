"""Frozen encoders of a run: selection, content hashes that identify their features, and feature computation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.utils import CONFIG_NAME, cached_file

from mowe_ray.config.fields import InlineConfig
from mowe_ray.config.model_section import ModelSection
from mowe_ray.data.cached_shards import CachedShard
from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.feature_cache import CachedEncoder
from mowe_ray.data.shards.storage import content_fingerprint
from mowe_ray.model.encoders import AudioEncoder, PadAudio, load_encoder, read_config
from mowe_ray.model.export import load_tower
from mowe_ray.model.hidden_states import chosen_layers, layers_of
from mowe_ray.model.precision import cast_weights
from mowe_ray.training.build import model_dtype

_VERSION = 2  # raise it when the same encoder would give other features
# Keys of a configuration on its origin, which do not change what the encoder computes.
_ORIGIN = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder whose features stay the same for the whole run.

    Attributes:
        label: `base_encoder`, or the name of the pool member.
        encoder_index: Index in `AudioTower.encoders()`: 0 is the base encoder, then comes the pool.
        source: Where its weights come from: a hub id, a folder, or an inline configuration.
        features: `last`, `layer:N` or `weighted_sum`.
    """

    label: str
    encoder_index: int
    source: str | dict[str, Any]
    features: str


def frozen_encoders(model: ModelSection) -> tuple[list[FrozenEncoder], list[str]]:
    """Return the encoders whose features can be kept, and a line about each of the notes."""
    frozen, notes = [], []
    for encoder_index, (label, source, train, features) in enumerate(_encoders(model)):
        if train != "frozen":
            notes.append(f"feature_cache: {label} is trained ({train}), so its features are computed every time")
        elif encoder_index == 0 and model.spec_augment is not None:
            notes.append(
                f"feature_cache: model.spec_augment masks the input of {label}, so its features are computed every time"
            )
        else:
            frozen.append(FrozenEncoder(label, encoder_index, source, features))
    return frozen, notes


def _encoders(model: ModelSection) -> Iterator[tuple[str, str | dict[str, Any], str, str]]:
    """Yield label, source, training and features of each encoder, in the order of the model."""
    if model.init_from is None:
        yield "base_encoder", _plain(model.base_encoder), model.train_base, model.base_encoder_features
        for weak in model.weak_encoders:
            yield weak.name, _plain(weak.checkpoint), weak.train, weak.features
        return
    train = {weak.name: weak.train for weak in model.weak_encoders}
    config = read_config(model.init_from)  # an export keeps its own encoders, and what is used of them
    base = getattr(config, "base_encoder", None)
    yield "base_encoder", model.init_from, model.train_base, getattr(base, "features", "last")
    for spec in getattr(config, "weak_encoders", None) or []:
        yield spec.name, model.init_from, train.get(spec.name, "frozen"), spec.features


def _plain(checkpoint: str | InlineConfig) -> str | dict[str, Any]:
    return checkpoint if isinstance(checkpoint, str) else checkpoint.config


def load_frozen(
    model: ModelSection, wanted: Sequence[FrozenEncoder], *, seed: int, gpu: bool
) -> dict[int, AudioEncoder]:
    """Load encoders, by `encoder_index`, with the weights and in the type that they have in the model (`assemble`)."""
    dtype = model_dtype(model, gpu)
    if model.init_from is not None:
        every = load_tower(model.init_from, dtype).encoders() if wanted else []
        loaded = {encoder.encoder_index: every[encoder.encoder_index] for encoder in wanted}
    else:
        loaded = {
            encoder.encoder_index: load_encoder(encoder.source, seed + encoder.encoder_index)[0] for encoder in wanted
        }
    for encoder in loaded.values():
        cast_weights(encoder, dtype)
        encoder.requires_grad_(False).eval()
    return loaded


def describe(encoder: AudioEncoder, frozen: FrozenEncoder, pad_audio: str) -> CachedEncoder:
    """Hash an encoder with its weights, and compute the size of its features."""
    layers = len(layers_of(frozen.features, encoder.num_layers))
    bytes_per_s = 2 * layers * encoder.width * SAMPLE_RATE / encoder.hop_samples
    key = encoder_key(encoder, frozen.features, pad_audio)
    return CachedEncoder(key, frozen.label, frozen.encoder_index, layers, encoder.width, bytes_per_s)


def encoder_key(encoder: AudioEncoder, features: str, pad_audio: str) -> str:
    """Return a hash of everything that determines the features of a frozen encoder: weights, types and settings."""
    config = {name: value for name, value in encoder.config.to_dict().items() if name not in _ORIGIN}
    settings = [_VERSION, type(encoder).__name__, config, encoder.front_end.to_dict(), features, pad_audio]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def origin_key(model: ModelSection, frozen: FrozenEncoder, *, seed: int, gpu: bool) -> str:
    """Return a hash of everything that determines `describe`, without loading weights: their files, or their seed."""
    if isinstance(frozen.source, str):
        drawn = 0
        read_config(frozen.source)  # raises a clear error if there is none
        folder = Path(str(cached_file(frozen.source, CONFIG_NAME))).parent
        files = [_version(file) for file in sorted(folder.iterdir()) if file.is_file()]
    else:
        drawn, files = seed + frozen.encoder_index, []
    origin = [_VERSION, torch.__version__, transformers.__version__, str(model_dtype(model, gpu)), model.pad_audio]
    origin += [frozen.source, frozen.encoder_index, frozen.label, frozen.features, drawn, files]
    return hashlib.blake2b(json.dumps(origin, sort_keys=True).encode(), digest_size=16).hexdigest()


def _version(file: Path) -> tuple[str, str, int]:
    # The time of the inode cannot be set back: it covers what lies between the blocks of a large file.
    return file.name, content_fingerprint(str(file)), file.stat().st_ctime_ns


def encode_clips(
    encoder: AudioEncoder,
    features: str,
    audio: CachedShard,
    *,
    pad_audio: PadAudio,
    device: torch.device,
    batch_seconds: float,
    max_batch_size: int,
) -> Iterator[tuple[list[int], list[npt.NDArray[np.uint16]]]]:
    """Yield the features of all clips of a shard, batch by batch: rows, and (L, frames, E) in bfloat16 of each.

    Only clips that the encoder pads to the same length share a batch, so that features depend on their clip alone.
    """
    for rows, samples in _equally_padded(encoder, audio.lengths, pad_audio, batch_seconds, max_batch_size):
        lengths = torch.from_numpy(audio.lengths[rows].astype(np.int64)).to(device)
        wave = np.zeros((len(rows), int(lengths.max())), np.float32)
        for clip, samples_of_clip in zip(wave, audio.waves(rows), strict=True):
            clip[: len(samples_of_clip)] = samples_of_clip
        with torch.no_grad():
            inputs = encoder.front_end(torch.from_numpy(wave).to(device), lengths, samples)
            states = torch.stack(chosen_layers(encoder, features, inputs, lengths), 1)
        # numpy has no bfloat16.
        values = states.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
        frames = encoder.num_frames(lengths).tolist()
        yield rows, [clip[:, :count] for clip, count in zip(values, frames, strict=True)]


def _equally_padded(
    encoder: AudioEncoder,
    lengths: npt.NDArray[np.int32],
    pad_audio: PadAudio,
    batch_seconds: float,
    max_batch_size: int,
) -> Iterator[tuple[list[int], int]]:
    """Yield rows with audio that are padded alike, and to how many samples."""
    rows: list[int] = []
    padded = 0
    # Sorted, so that clips which are padded alike follow each other.
    for row in np.argsort(lengths, kind="stable").tolist():
        if not lengths[row]:
            continue
        samples = encoder.pad_samples(int(lengths[row]), pad_audio)
        full = len(rows) == max_batch_size or (len(rows) + 1) * samples > batch_seconds * SAMPLE_RATE
        if rows and (samples != padded or full):
            yield rows, padded
            rows = []
        rows, padded = [*rows, row], samples
    if rows:
        yield rows, padded
