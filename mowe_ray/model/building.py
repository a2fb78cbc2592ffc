"""Assemble a model from checkpoints, and set which of its parts train.

tokenizer = AutoTokenizer.from_pretrained("microsoft/Phi-3-mini-4k-instruct")
model = build_model(
    base_encoder="openai/whisper-large-v3",
    weak_encoders=[
            WeakEncoder("tiny", "openai/whisper-tiny"),
            WeakEncoder("hubert", "facebook/hubert-base-ls960"),
        ],
    language_model="microsoft/Phi-3-mini-4k-instruct",
    tokenizer=tokenizer,
    lora=Lora(r=8, alpha=32),
)
processor = build_processor(model, tokenizer)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .chat import ChatTokens
from .configuration_mowe import EncoderSpec, MoweConfig
from .encoders import AudioEncoder, EncoderExtras, load_encoder, same_weights, stored_weights
from .export import load_exported
from .generation_settings import greedy
from .hidden_states import chosen_layers
from .lora import inject_lora, merge_lora
from .modeling_mowe import MoweForConditionalGeneration
from .pool import PoolMember
from .precision import cast_weights
from .processing_mowe import AUDIO_TOKEN, MoweProcessor

Source = str | Mapping[str, Any]
"""A hub id or folder, or a transformers configuration with `model_type` for random weights."""

_FREE_OPTIONS = (
    *("router_top_k", "router_temperature", "router_noise", "router_execution"),
    *("pad_audio", "spec_augment", "mowe_loss", "mowe_loss_weight", "mowe_z_weight", "mowe_loss_parts"),
)

PARTS = ("base_encoder", "weak_encoders", "routers", "adapter", "language_model")


@dataclass(frozen=True)
class WeakEncoder:
    """A pool member to load: see `EncoderSpec` for the choices."""

    name: str
    checkpoint: Source
    train: str = "frozen"
    features: str = "last"


@dataclass(frozen=True)
class Lora:
    """LoRA of the language model; encoders that train by LoRA take all but the targets from it.

    Attributes:
        r: Rank.
        alpha: Scale: the update counts alpha / r.
        dropout: Dropout probability before the adapters.
        target_modules: Names of the layers to adapt, or `all-linear`.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


def build_model(
    *,
    base_encoder: Source,
    weak_encoders: Sequence[WeakEncoder] = (),
    language_model: Source,
    tokenizer: PreTrainedTokenizerBase,
    lora: Lora | None = None,
    train_base: str = "frozen",
    base_features: str = "last",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    loading: AbstractContextManager[None] | None = None,
    **options: Any,
) -> MoweForConditionalGeneration:
    """Build a model from its parts' checkpoints, ready to train.

    Args:
        base_encoder: Where its weights come from.
        weak_encoders: The pool; none for the baseline.
        language_model: Where its weights come from.
        tokenizer: The language model's; gains the audio token.
        lora: Adapters of the language model; None trains all of it.
        train_base: `frozen`, `full` or `lora`.
        base_features: Hidden states of the base encoder that are used: see `hidden_states`.
        dtype: Type of all weights; computed buffers keep theirs.
        seed: Seed of everything drawn here; torch's own generator is left as it was.
        loading: Entered while the language model's checkpoint loads, so that its weights may become shards.
        **options: Other fields of `MoweConfig`: fusion, latents, router_*, adapter, downsample, pad_audio,
            spec_augment, mowe_loss, mowe_loss_*, mowe_z_weight.

    Raises:
        ValueError: if a checkpoint cannot be used or options contradict each other.
    """
    known = {name for name in MoweConfig.__dataclass_fields__ if name not in ("base_encoder", "weak_encoders", "lora")}
    if unknown := options.keys() - known:
        raise TypeError(f"build_model has no options {', '.join(sorted(unknown))}")
    audio_token_id = add_audio_token(tokenizer)
    with torch.random.fork_rng():
        base, _ = load_encoder(base_encoder, seed)
        loaded = [load_encoder(weak.checkpoint, seed + 1 + index) for index, weak in enumerate(weak_encoders)]
        torch.manual_seed(seed)
        llm = load_language_model(language_model, tokenizer, dtype, loading)
        config = MoweConfig(
            base_encoder=EncoderSpec("base", base.config, base.front_end, train_base, base_features),
            weak_encoders=[
                EncoderSpec(weak.name, encoder.config, encoder.front_end, weak.train, weak.features)
                for weak, (encoder, _) in zip(weak_encoders, loaded, strict=True)
            ],
            # A copy: building the outer configuration resets the attention implementation of the
            # inner.
            text_config=copy.deepcopy(llm.config),
            audio_token_id=audio_token_id,
            **options,
        )
        model = MoweForConditionalGeneration(config, base, [encoder for encoder, _ in loaded], llm)
        _copy_layer_weights(model, [extras for _, extras in loaded])
        cast_weights(model.audio_tower, dtype)  # the language model was loaded in it
        make_trainable(model, lora)
    model.generation_config = _generation_config(llm, tokenizer, audio_token_id)
    return model


def load_model(
    folder: str,
    *,
    train_base: str = "frozen",
    train_weak: Mapping[str, str] | None = None,
    lora: Lora | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    loading: AbstractContextManager[None] | None = None,
    **options: Any,
) -> MoweForConditionalGeneration:
    """Load an exported model to train it further.

    The architecture is the export's. Adapters it still has are merged, so that `lora` starts anew.

    Args:
        folder: An export or other `save_pretrained` folder, or hub id.
        train_base: `frozen`, `full` or `lora`.
        train_weak: `frozen`, `full` or `lora` by member name; members not named are frozen.
        lora: New adapters of the language model; None trains all of it.
        dtype: Type of all weights.
        seed: Seed of the adapters.
        loading: As in `build_model`; a folder with unmerged adapters loads as a whole.
        **options: Fields of `MoweConfig` that shape no weights: router_top_k, router_temperature,
            router_noise, router_execution, pad_audio, spec_augment, mowe_loss, mowe_loss_*, mowe_z_weight.

    Raises:
        ValueError: if `train_weak` names a member the export does not have, or a file of the export is damaged.
    """
    if fixed := options.keys() - set(_FREE_OPTIONS):
        raise TypeError(f"an exported model's {', '.join(sorted(fixed))} cannot change")
    stored_weights(folder)
    config = MoweConfig.from_pretrained(folder, **options)
    model = load_exported(folder, config, dtype, loading)
    specs: list[EncoderSpec] = config.weak_encoders or []
    choices = dict(train_weak or {})
    if unknown := choices.keys() - {spec.name for spec in specs}:
        raise ValueError(
            f"model.weak_encoders: {', '.join(sorted(unknown))} not in the pool of "
            f"model.init_from={folder}: {', '.join(spec.name for spec in specs) or 'it is empty'}"
        )
    merge_lora(model)
    model.config.lora = {}
    assert isinstance(model.config.base_encoder, EncoderSpec)
    model.config.base_encoder = replace(model.config.base_encoder, train=train_base)
    model.config.weak_encoders = [replace(spec, train=choices.get(spec.name, "frozen")) for spec in specs]
    _unfreeze(model)
    model.apply_train_modes()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make_trainable(model, lora)
    return model


def _unfreeze(model: MoweForConditionalGeneration) -> None:
    """Train all that transformers itself does not fix, as it does Whisper's sinusoidal positions."""
    config = copy.deepcopy(model.config)
    config.weak_encoders = [replace(spec, train="full") for spec in config.weak_encoders or []]
    assert isinstance(config.base_encoder, EncoderSpec)
    config.base_encoder = replace(config.base_encoder, train="full")
    with torch.device("meta"):
        untouched = dict(MoweForConditionalGeneration(config).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(untouched[name].requires_grad)


def build_processor(model: MoweForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> MoweProcessor:
    """Return the processor that makes inputs for `model`."""
    config = model.language_model.config.get_text_config()
    return MoweProcessor(
        tokenizer,
        model.audio_tower.base_encoder.frame_layers,
        model.config.downsample,
        extra_tokens=0 if model.audio_tower.fusion is None else model.audio_tower.fusion.tokens,
        max_positions=getattr(config, "max_position_embeddings", None),
        chunk_samples=model.audio_tower.base_encoder.chunk_samples,
    )


def add_audio_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the tokenizer the audio token if it lacks it, and return its id."""
    if AUDIO_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
    return tokenizer.get_vocab()[AUDIO_TOKEN]


def load_language_model(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    loading: AbstractContextManager[None] | None = None,
) -> PreTrainedModel:
    """Load a causal language model with room for all of the tokenizer's tokens.

    An inline configuration takes the vocabulary size and special tokens it does not name from the
    tokenizer. `loading` is entered around what is done to a checkpoint, not to random weights.
    """
    model: PreTrainedModel
    if isinstance(source, str):
        stored_weights(source)
        with loading or nullcontext():
            try:
                model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
            except OSError as error:
                raise ValueError(f"model.language_model: cannot read a checkpoint from {source!r}: {error}") from error
            _make_room(model, tokenizer)
            return model
    defaults = {"vocab_size": len(tokenizer)} | {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**defaults, **source}), dtype=dtype)
    _make_room(model, tokenizer)
    return model


def _make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        # Random new rows: their text embedding is never read, the audio takes its place.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def parameter_parts(model: nn.Module) -> dict[str, str]:
    """Return which of `PARTS` each parameter belongs to, by parameter name."""
    return {name: _part(name) for name, _ in model.named_parameters()}


def untouched_parameters(model: nn.Module) -> list[str]:
    """Name the trainable parameters that have no gradient, after a backward pass."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def equal_members(model: MoweForConditionalGeneration) -> list[str]:
    """Describe pairs of pool members with the same weights and the same choice of features."""
    specs: list[EncoderSpec] = model.config.weak_encoders or []
    members = zip(specs, model.audio_tower.encoders()[1:], strict=True)
    warnings = []
    for (first, encoder), (second, other_encoder) in combinations(members, 2):
        same_features = first.features == second.features and first.front_end == second.front_end
        if same_features and same_weights(encoder, other_encoder):
            fate = (
                "stay equal, since both are frozen: remove one, train one, or choose other features"
                if first.train == second.train == "frozen"
                else "differ only by what training makes of them"
            )
            warnings.append(f"weak encoders {first.name!r} and {second.name!r} have the same weights and {fate}")
    return warnings


def strong_members(model: MoweForConditionalGeneration) -> list[str]:
    """Describe pool members that are not weak: a tenth of the base encoder's parameters or more [paper].

    The paper's own pool has such members if only encoders are counted (HuBERT-base beside Whisper-large's encoder).
    """
    base, *members = ((sum(p.numel() for p in e.parameters())) for e in model.audio_tower.encoders())
    return [
        f"weak encoder {spec.name!r} has {size / base:.0%} of the base encoder's parameters: weak means at most 10 %"
        for spec, size in zip(model.config.weak_encoders or [], members, strict=True)
        if size > base / 10
    ]


def _part(name: str) -> str:
    tower = "audio_tower."
    if name.startswith("language_model."):
        return "language_model"
    if name.startswith(tower + "base_encoder."):
        return "base_encoder"
    if name.startswith((tower + "independent_router.", tower + "dependent_router.")):
        return "routers"
    if name.startswith(tower + "pool.") and ".encoder." in name:
        return "weak_encoders"
    return "adapter"


def _copy_layer_weights(model: MoweForConditionalGeneration, extras: Sequence[EncoderExtras]) -> None:
    for member, extra in zip(_members(model), extras, strict=True):
        if member.layer_weights is not None and extra.layer_weights is not None:
            with torch.no_grad():
                member.layer_weights.copy_(extra.layer_weights.flatten())


def _members(model: MoweForConditionalGeneration) -> list[PoolMember]:
    pool = model.audio_tower.pool
    return [] if pool is None else [member for member in pool.members if isinstance(member, PoolMember)]


def make_trainable(model: MoweForConditionalGeneration, lora: Lora | None) -> None:
    """Add the LoRA adapters, and freeze what no gradient can reach."""
    adapters: dict[str, dict[str, Any]] = {}
    if lora is not None:
        adapters["language_model"] = asdict(lora)
    base, pool = model.config.base_encoder, model.config.weak_encoders or []
    paths = [
        "audio_tower.base_encoder",
        *(f"audio_tower.pool.members.{i}.encoder" for i in range(len(pool))),
    ]
    for path, spec in zip(paths, [base, *pool], strict=True):
        if isinstance(spec, EncoderSpec) and spec.train == "lora":
            encoder = model.get_submodule(path)
            assert isinstance(encoder, AudioEncoder)
            adapters[f"{path}.model"] = asdict(replace(lora or Lora(), target_modules=encoder.lora_targets))
    for path, values in adapters.items():
        inject_lora(model.get_submodule(path), **values)
    model.config.lora = adapters
    _freeze_unreached(model)


def _freeze_unreached(model: MoweForConditionalGeneration) -> None:
    """Freeze encoder weights that the chosen features do not depend on, found by one backward pass.

    With `layer:N` these are all later layers. An optimizer would wait for their gradient forever.
    """
    tower = model.audio_tower
    members = [None, *_members(model)]
    for member, encoder in zip(members, tower.encoders(), strict=True):
        if encoder.frozen:
            continue
        device = next(encoder.parameters()).device
        samples = encoder.min_samples
        lengths = torch.tensor([samples], device=device)
        features = encoder.front_end(torch.zeros(1, samples, device=device), lengths, samples)
        choice = tower.base_layers.choice if member is None else member.choice
        # Without lengths, for nothing is padded: transformers reads the values of a mask, and on meta there are none.
        layers = chosen_layers(encoder, choice, features, None)
        torch.stack([layer.sum() for layer in layers]).sum().backward()
        for parameter in encoder.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    model.zero_grad(set_to_none=True)


def _generation_config(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, audio_token_id: int
) -> GenerationConfig:
    """Return the language model's special tokens, which also stops where the processor ends answers."""
    config = greedy(llm.generation_config, ChatTokens(tokenizer, AUDIO_TOKEN).end_tokens())
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({end for end in ends if end is not None})
    config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config.suppress_tokens = [*(config.suppress_tokens or []), audio_token_id]
    return config
