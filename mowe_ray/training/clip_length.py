"""Whether the encoders of a configuration are known, and the longest clip they take, read from their config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from mowe_ray.config.fields import CheckpointSource, InlineConfig
from mowe_ray.config.model_section import ModelSection

_RATE = 16_000
# Whisper's learned positions, two spectrogram frames of 10 ms each; transformers' own default.
_POSITIONS, _FRAMES_PER_POSITION, _HOP = 1500, 2, 160

_NAMES_OF_POSITIONS = {"glmasr_encoder": "max_position_embeddings"} | dict.fromkeys(
    ("whisper", "qwen2_audio_encoder", "audioflamingo3_encoder", "voxtral_encoder"), "max_source_positions"
)

# Those of `mowe_ray.model.encoders.ENCODERS` without plugins, which takes seconds to import.
FAMILIES = frozenset(
    {
        "audio-spectrogram-transformer",
        "audioflamingo3_encoder",
        "clap_audio_model",
        "data2vec-audio",
        "glmasr_encoder",
        "hubert",
        "moonshine",
        "parakeet_encoder",
        "qwen2_audio_encoder",
        "qwen3_asr_encoder",
        "sew",
        "sew-d",
        "unispeech",
        "unispeech-sat",
        "voxtral_encoder",
        "wav2vec2",
        "wav2vec2-bert",
        "wav2vec2-conformer",
        "wavlm",
        "whisper",
    }
)


# Of language models transformers has hundreds: these spare the import.
_LANGUAGE_MODELS = frozenset({"gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"})


def check_families(model: ModelSection) -> None:
    """Refuse networks of families that are not known; configurations that are not here are passed over.

    Raises:
        ValueError: There is one; for an encoder, it lists the families, and says how to add another.
    """
    if model.init_from is not None:
        return
    for label, source in {**_sources(model), "model.language_model": model.language_model}.items():
        config, is_language_model = _config_of(source), label == "model.language_model"
        known = _LANGUAGE_MODELS if is_language_model else FAMILIES
        if config.get("model_type") in known or not (config or Path(str(source)).is_dir()):
            continue
        from mowe_ray.model.encoders import find_encoder, read_config  # a plugin's, a part of another model, or none

        find: Callable[[str | Mapping[str, Any]], object] = read_config if is_language_model else find_encoder
        try:
            find(source if isinstance(source, str) else source.config)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error


def check_clip_length(model: ModelSection, max_s: float, key: str = "data.max_duration_s") -> None:
    """Refuse a limit on clips that an encoder does not reach; configurations that are not here are passed over.

    Args:
        max_s: The longest clip, in seconds.
        key: The configuration key that it comes from.

    Raises:
        ValueError: Clips may be longer than an encoder takes.
    """
    _check(_configs(model), max_s, key)


def check_exported_clip_length(export: Mapping[str, Any], max_s: float, key: str) -> None:
    """As `check_clip_length`, for the content of an export's config.json."""
    _check(_exported(export), max_s, key)


def _check(configs: Iterable[tuple[str, Mapping[str, Any]]], max_s: float, key: str) -> None:
    for label, config in configs:
        longest = min(_limits(config), default=max_s)
        if max_s > longest:
            raise ValueError(
                f"{key}: {max_s:g} s is more than the {longest:g} s that {label} takes; set {key}={longest:g} or lower"
            )


def _limits(config: Mapping[str, Any]) -> Iterator[float]:
    """Yield the longest clip in seconds of an encoder with positions, which may be a part of another model."""
    for part in (config, *config.values()):
        if isinstance(part, Mapping) and (name := _NAMES_OF_POSITIONS.get(part.get("model_type", ""))):
            yield part.get(name, _POSITIONS) * _FRAMES_PER_POSITION * _HOP / _RATE


def _configs(model: ModelSection) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the key and the configuration of each encoder that can be read without a download."""
    if model.init_from is not None:
        yield from _exported(_read(model.init_from))
        return
    for label, source in _sources(model).items():
        yield label, _config_of(source)


def _sources(model: ModelSection) -> dict[str, CheckpointSource]:
    pool = {f"model.weak_encoders {weak.name}": weak.checkpoint for weak in model.weak_encoders}
    return {} if model.init_from is not None else {"model.base_encoder": model.base_encoder} | pool


def _config_of(source: CheckpointSource) -> Mapping[str, Any]:
    return source.config if isinstance(source, InlineConfig) else _read(source)


def _exported(export: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for spec in (export.get("base_encoder"), *(export.get("weak_encoders") or [])):
        if isinstance(spec, Mapping):
            yield f"the export's encoder {spec.get('name')}", spec.get("config") or {}


def _read(source: str) -> Mapping[str, Any]:
    """Return the config.json of a folder, or of a hub id whose files are in the cache; else nothing."""
    if (folder := Path(source)).is_dir():
        file: Any = folder / "config.json"
    else:
        try:
            file = try_to_load_from_cache(source, "config.json")
        except ValueError:  # not a hub id; who loads it says so
            file = None
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8")) if isinstance(file, str | Path) else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
