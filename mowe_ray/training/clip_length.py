"""Whether the encoders of a configuration are known, and the longest clip they take, read from their config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from mowe_ray.config.fields import CheckpointSource, InlineConfig
from mowe_ray.config.model_section import ModelSection

_RATE = 16_000
# Whisper's learned positions, two spectrogram frames of 10 ms each; transformers' own default.
_POSITIONS, _FRAMES_PER_POSITION, _HOP = 1500, 2, 160

_NAMES_OF_POSITIONS = {"glmasr_encoder": "max_position_embeddings"} | dict.fromkeys(
    ("whisper", "qwen2_audio_encoder", "audioflamingo3_encoder", "voxtral_encoder", "moss_transcribe_diarize_audio"),
    "max_source_positions",
)

# Those of `mowe_ray.model.encoders.ENCODERS` without plugins, which takes seconds to import.
FAMILIES = frozenset(
    {
        "audio-spectrogram-transformer",
        "audioflamingo3_encoder",
        "clap_audio_model",
        "data2vec-audio",
        "fun_asr_nano_encoder",
        "glmasr_encoder",
        "granite_speech_encoder",
        "granite_speech_plus_encoder",
        "hubert",
        "lasr_encoder",
        "moonshine",
        "moss_transcribe_diarize_audio",
        "parakeet_encoder",
        "qwen2_5_omni_audio_encoder",
        "qwen2_audio_encoder",
        "qwen3_asr_encoder",
        "qwen3_omni_moe_audio_encoder",
        "seamless_m4t",
        "seamless_m4t_v2",
        "sew",
        "sew-d",
        "speech_to_text",
        "speecht5",
        "unispeech",
        "unispeech-sat",
        "voxtral_encoder",
        "voxtral_realtime_encoder",
        "wav2vec2",
        "wav2vec2-bert",
        "wav2vec2-conformer",
        "wavlm",
        "whisper",
    }
)


# Of language models transformers has hundreds: these spare the import.
_LANGUAGE_MODELS = frozenset({"gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"})

_WEIGHTS = tuple(
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def check_families(model: ModelSection) -> None:
    """Refuse checkpoints that cannot be what they are given as; those that are not here are passed over.

    Raises:
        ValueError: A family that is not known, an encoder in place of the language model or the reverse, a folder
            without weights, or a language model without a tokenizer of its own; names the key, and says what to do.
    """
    if model.init_from is not None:
        return
    for label, source in {**_sources(model), "model.language_model": model.language_model}.items():
        check = _check_language_model if label == "model.language_model" else _check_encoder
        try:
            check(source, _config_of(source))
            if isinstance(source, str) and Path(source).is_dir() and not _has_any(source, _WEIGHTS):
                raise ValueError(
                    f"{source!r} has no weights ({' or '.join(_WEIGHTS)}): name the folder that has them, or give "
                    "{config: {...}} for random ones"
                )
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error


def _check_encoder(source: CheckpointSource, config: Mapping[str, Any]) -> None:
    if config.get("model_type") in FAMILIES or not (config or Path(str(source)).is_dir()):
        return
    from mowe_ray.model.encoders import UnknownFamilyError, find_encoder  # a plugin's, a part of another model, or none

    try:
        find_encoder(source if isinstance(source, str) else source.config)
    except UnknownFamilyError as error:
        if _causal_class(error.family).endswith("ForCausalLM"):
            raise ValueError(
                f"{error.family!r} is a language model, and belongs to model.language_model; encoders are "
                f"{', '.join(sorted(FAMILIES))}"
            ) from error
        raise


def _check_language_model(source: CheckpointSource, config: Mapping[str, Any]) -> None:
    family = config.get("model_type")
    if family not in _LANGUAGE_MODELS and (config or Path(str(source)).is_dir()):
        from mowe_ray.model.encoders import ENCODERS, read_config

        family = read_config(source if isinstance(source, str) else source.config).model_type
        if family in ENCODERS:
            raise ValueError(
                f"{family!r} is an audio encoder, for model.base_encoder or model.weak_encoders; {_EXPECTED}"
            )
        if not _causal_class(family):
            raise ValueError(f"{family!r} is not supported: {_EXPECTED}")
    if isinstance(source, str) and Path(source).is_dir():
        _check_tokenizer(Path(source), config)


_EXPECTED = "a language model is one of those that AutoModelForCausalLM loads, such as llama, phi3, or qwen3"


def _causal_class(family: str) -> str:
    """Return the name of transformers' causal language model of a family, or nothing."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, ""))


def _check_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    if not _has_any(folder, _TOKENIZERS):
        raise ValueError(
            f"'{folder}' has no tokenizer (tokenizer.json): copy the files of the language model's own there"
        )
    try:
        known = len(json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # older formats, and damaged files: who loads them says so
    text = config.get("text_config")
    rows = (text if isinstance(text, Mapping) else config).get("vocab_size")
    if isinstance(rows, int) and known > rows:
        raise ValueError(
            f"'{folder}' has the tokenizer of another model: {known} tokens for {rows} of vocab_size in config.json; "
            "copy the tokenizer files of the language model's own there"
        )


def _has_any(folder: str | Path, names: Iterable[str]) -> bool:
    return any((Path(folder) / name).is_file() for name in names)


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
