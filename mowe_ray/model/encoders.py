"""Find, load and compare audio encoders.

encoder, extras = load_encoder("openai/whisper-tiny")
frames = encoder(encoder.front_end(wave, lengths, padded_samples))
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)

from .encoder_asr import GraniteSpeechTower  # noqa: F401 - here and below: the module enters its families
from .encoder_ast import ASTAudioEncoder  # noqa: F401
from .encoder_base import ENCODERS, AudioEncoder, PadAudio
from .encoder_clap import ClapAudioEncoder  # noqa: F401
from .encoder_conformer import Wav2Vec2BertAudioEncoder  # noqa: F401
from .encoder_module import EncoderConfig, ModuleEncoder
from .encoder_qwen3 import Qwen3AsrTower  # noqa: F401
from .encoder_sew import SEWAudioEncoder  # noqa: F401
from .encoder_wav2vec2 import Wav2Vec2AudioEncoder  # noqa: F401
from .encoder_whisper import WhisperAudioEncoder  # noqa: F401

__all__ = [
    "ENCODERS",
    "AudioEncoder",
    "EncoderConfig",
    "EncoderExtras",
    "ModuleEncoder",
    "PadAudio",
    "encoder_class",
    "find_encoder",
    "load_encoder",
    "quiet_transformers",
    "read_config",
    "same_weights",
    "stored_weights",
]


@dataclass(frozen=True)
class EncoderExtras:
    """Values of a checkpoint besides the encoder's weights.

    Attributes:
        layer_weights: (L + 1,) logits of a learned sum over hidden states, to be softmaxed, from
            classifiers such as superb/hubert-base-superb-er; None in most checkpoints.
        preprocessor: the values of its preprocessor_config.json; {} when it has none.
    """

    layer_weights: Tensor | None = None
    preprocessor: dict[str, Any] = field(default_factory=dict)


def encoder_class(config: PretrainedConfig) -> type[AudioEncoder]:
    """The adapter class for a configuration.

    Raises:
        ValueError: its family has no adapter; the message lists the families that have.
    """
    if config.model_type not in ENCODERS:
        raise UnknownFamilyError(config.model_type)
    return ENCODERS[config.model_type]


class UnknownFamilyError(ValueError):
    """Raised for a `model_type` that is no encoder's; lists those that are, and says how to add one."""

    def __init__(self, family: str) -> None:
        self.family = family
        super().__init__(
            f"encoder family {family!r} is not supported; known families: {', '.join(sorted(ENCODERS))}. Another is a "
            'plugin (docs/encoders.md, "An encoder of your own"), which has to be named: plugins: [FILE.py]'
        )


def load_encoder(source: str | Mapping[str, Any], seed: int = 0) -> tuple[AudioEncoder, EncoderExtras]:
    """Load the encoder contained in any transformers checkpoint, in float32.

    Args:
        source: a folder or hub id of a model that contains the encoder (with a decoder, a
            classifier, or bare), or a configuration `{"model_type": ..., ...}` for random weights.
        seed: seed of random weights.

    Raises:
        ValueError: the source cannot be read, its family is unknown, weights of the encoder are
            missing, or it expects another sample rate than 16 kHz.
    """
    config, family = find_encoder(source)
    if isinstance(source, str):
        if issubclass(family, ModuleEncoder):
            raise ValueError(f"{source!r}: {config.model_type} has no checkpoints; give its values inline, as config")
        preprocessor = _read_preprocessor(source, family.sample_rate)
        # What is left over are decoders and heads; of these only the layer weights of classifiers are of use.
        model, leftover = _load_weights(family, source, config)
        weights = _read_tensor(source, "layer_weights") if "layer_weights" in leftover else None
        extras = EncoderExtras(weights, preprocessor)
        return family(config, family.make_front_end(config, preprocessor), model), extras
    with torch.random.fork_rng():
        # A fork: random encoders must not change what is drawn after them.
        torch.manual_seed(seed)
        encoder = family(config, family.make_front_end(config, {}))
        encoder.load_weights()
        return encoder, EncoderExtras()


def find_encoder(source: str | Mapping[str, Any]) -> tuple[PretrainedConfig, type[AudioEncoder]]:
    """The configuration and the adapter class of the encoder in a checkpoint, or in an inline mapping.

    Raises:
        ValueError: as `read_config`, or its family is not supported.
    """
    try:
        config = read_config(source)
    except UnknownModelTypeError as error:
        raise UnknownFamilyError(error.model_type) from error
    # Itself, or a part of it, as in audio language models.
    config = _known_part(config) or config
    return config, encoder_class(config)


def _known_part(config: PretrainedConfig) -> PretrainedConfig | None:
    if config.model_type in ENCODERS:
        return config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    known = [_known_part(part) for part in parts if isinstance(part, PretrainedConfig)]
    return next((part for part in known if part is not None), None)


def read_config(source: str | Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a checkpoint, or of an inline mapping.

    Raises:
        ValueError: there is no such checkpoint, a file of it is damaged, or the mapping names no model_type.
    """
    if isinstance(source, str):
        stored_weights(source)
        try:
            values, _ = PretrainedConfig.get_config_dict(source)
            if not values:
                raise OSError("it has no config.json")
            _check_known(values.get("model_type"), f"{source!r}: ")
            config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except OSError as error:
            raise ValueError(f"cannot read a checkpoint from {source!r}: {error}") from error
        return config
    values = dict(source)
    if "model_type" not in values:
        raise ValueError("an inline config needs model_type, for example 'whisper' or 'llama'")
    _check_known(values["model_type"])
    return AutoConfig.for_model(**values)


class UnknownModelTypeError(ValueError):
    """Raised for a `model_type` that transformers does not know."""

    def __init__(self, model_type: str, place: str) -> None:
        self.model_type = model_type
        super().__init__(f"{place}model_type {model_type!r} is unknown; if a plugin adds it: plugins: [FILE.py]")


def _check_known(model_type: str | None, place: str = "") -> None:
    if model_type is None:
        raise ValueError(f"{place}its config.json names no model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnknownModelTypeError(model_type, place)


def stored_weights(folder: str) -> set[str]:
    """Return the names of the weights in a folder, from the headers of its files; none of a hub id.

    Only files that transformers reads are looked at: a folder may hold others, of any size.

    Raises:
        ValueError: A file is cut or damaged; names it, as the libraries that load it do not.
    """
    names: set[str] = set()
    for file in sorted(Path(folder) / name for name in (*_READ_JSON, *_weight_files(Path(folder)))):
        try:
            if file.suffix == ".json" and file.is_file():
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors" and file.is_file():
                with safe_open(file, "pt") as weights:
                    names.update(weights.keys())
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} is cut or damaged ({error}): copy it again, or export the model again") from error
    return names


_READ_JSON = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", SAFE_WEIGHTS_INDEX_NAME),
)


def _weight_files(folder: Path) -> set[str]:
    """Return the names of the files with a folder's weights: the one, or those of the index, if that can be read."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return {SAFE_WEIGHTS_NAME}
    try:
        return {str(file) for file in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()  # a damaged index is told as such


def same_weights(first: AudioEncoder, second: AudioEncoder) -> bool:
    """True when two encoders are of one family and equal in every weight."""
    if type(first) is not type(second):
        return False
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def _load_weights(
    family: type[AudioEncoder], source: str, config: PretrainedConfig
) -> tuple[PreTrainedModel, set[str]]:
    """The encoder with its weights, and the checkpoint's keys that are not the encoder's."""
    with quiet_transformers():
        loaded: Any = family.model_class.from_pretrained(
            source,
            config=family.quiet(config),
            key_mapping=dict(family.key_mapping) or None,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{source!r} lacks {len(missing)} weights of a {config.model_type} encoder: {shown}. "
            "Name a checkpoint that contains the whole encoder"
        )
    return model, set(report["unexpected_keys"])


def _read_preprocessor(source: str, expected_rate: int) -> dict[str, Any]:
    try:
        values, _ = FeatureExtractionMixin.get_feature_extractor_dict(source)
    except OSError:
        return {}  # the configuration's own values and the family's defaults then decide
    rate = values.get("sampling_rate", expected_rate)
    if rate != expected_rate:
        raise ValueError(f"{source!r} expects audio at {rate} Hz; encoders of its family get {expected_rate} Hz here")
    return dict(values)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back the report on unused weights: decoders and heads are left out on purpose."""
    verbosity = logging.get_verbosity()
    progress_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()


def _read_tensor(source: str, name: str) -> Tensor:
    """Return the tensor called `name` in a folder's or hub id's weights, in float32.

    Looks where `from_pretrained` looks: safetensors before pickled weights, single files before sharded ones.
    Pickles are read with `weights_only`, which runs no code.

    Raises:
        KeyError: no weights file holds such a tensor.
    """
    for file_name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        index_name = SAFE_WEIGHTS_INDEX_NAME if file_name == SAFE_WEIGHTS_NAME else WEIGHTS_INDEX_NAME
        path = _find_file(source, file_name)
        index = None if path else _find_file(source, index_name)
        if index:
            shard = json.loads(index.read_text())["weight_map"].get(name)
            path = _find_file(source, shard) if shard else None
        if path and path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                return torch.as_tensor(tensors.get_tensor(name)).float()
        if path:
            return torch.as_tensor(torch.load(path, map_location="cpu", weights_only=True)[name]).float()
    raise KeyError(f"no weights file of {source!r} holds {name!r}")


def _find_file(source: str, file_name: str) -> Path | None:
    found = cached_file(source, file_name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
