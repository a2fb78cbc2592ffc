"""Parameters and operations of a configured model, counted on PyTorch's meta device before any weight exists.

A checkpoint whose configuration is out of reach gets a tiny stand-in, so that the rest can still be
built; every number that depends on the stand-in is reported as unknown, with the file it needs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from mowe_ray.config.fields import InlineConfig
from mowe_ray.config.model_section import ModelSection
from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.building import add_audio_token, make_trainable, parameter_parts
from mowe_ray.model.configuration_mowe import EncoderSpec, MoweConfig
from mowe_ray.model.cost import encoder_on_meta, language_model_on_meta
from mowe_ray.model.encoders import AudioEncoder
from mowe_ray.model.export import open_exported
from mowe_ray.training.build import DEFAULT_VOCABULARY, architecture_options, lora_of
from mowe_ray.training.flops import (
    CLIP_S,
    Amount,
    audio_tokens,
    expected_share,
    part_gflops,
    running_members,
)

# Any small configuration will do: no number that depends on a stand-in is reported.
_STAND_IN_ENCODER = {"model_type": "whisper", "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1}
_STAND_IN_DECODER = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


@dataclass(frozen=True)
class PartCost:
    """One row of the table: `gflops` of one forward pass over a clip of `CLIP_S` seconds.

    Amounts are None where they depend on files that are not here; `needs` names those.
    """

    name: str
    weights: Amount | None
    trainable: int | None
    gflops: Amount | None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """Costs of a model.

    Attributes:
        model: On the meta device, with stand-ins for what is unknown.
        parts: All parts of the model.
        running: Pool members that run for one clip, at least and at most.
        expected_share: Share of the clips a member runs for while the routers are undecided.
        audio_tokens: Tokens of the language model that a clip of `CLIP_S` becomes; None if unknown.
        notes: What the numbers leave out.
    """

    model: MoweForConditionalGeneration
    parts: list[PartCost]
    running: tuple[int, int]
    expected_share: float
    audio_tokens: int | None
    notes: list[str]

    @property
    def unknown(self) -> list[str]:
        """Names of the parts that the totals leave out."""
        return [part.name for part in self.parts if part.needs]

    @property
    def total(self) -> PartCost:
        """Sum of all that is known."""
        members = max((len(part.weights.members) for part in self.parts if part.weights is not None), default=0)
        nothing = Amount(0, (0,) * members)
        return PartCost(
            "total",
            sum((part.weights for part in self.parts if part.weights is not None), nothing),
            sum(part.trainable or 0 for part in self.parts),
            sum((part.gflops for part in self.parts if part.gflops is not None), nothing),
        )


def estimate(section: ModelSection) -> Estimate:
    """Build the model of a configuration without weights, and count.

    Raises:
        ValueError: A checkpoint cannot be used, or options contradict each other; the message names the key.
    """
    lora = lora_of(section)
    with torch.device("meta"):
        if section.init_from is None:
            model, missing, notes = _assembled(section)
        else:
            model, missing, notes = _exported(section, section.init_from), {}, []
        if "language_model" in missing and lora is not None:
            lora = replace(lora, target_modules="all-linear")  # any other choice may not fit the stand-in
        make_trainable(model, lora)
    running = running_members(model.config)
    tokens = audio_tokens(model, CLIP_S)
    parts = _parts(model, missing, tokens)
    return Estimate(
        model, parts, running, expected_share(model.config), None if "base_encoder" in missing else tokens, notes
    )


@dataclass(frozen=True)
class ExportCost:
    """The cost of an exported model.

    Attributes:
        members: Names of the M pool members.
        routed: Whether routers choose among them for each clip; else all run, or may run for some frame.
        weights: All its weights.
        gflops: Of one forward pass over a clip of `CLIP_S`.
    """

    members: list[str]
    routed: bool
    weights: Amount
    gflops: Amount


def estimate_export(folder: str) -> ExportCost:
    """Count an export, after a check that all its weights exist.

    Raises:
        ValueError: Weights are missing, or the folder is no export.
    """
    model = open_exported(folder)
    # Only the totals are used: how many members run follows from the measured loads.
    total = Estimate(model, _parts(model, {}, audio_tokens(model, CLIP_S)), (0, 0), 0.0, None, []).total
    assert total.weights is not None
    assert total.gflops is not None
    members = [spec.name for spec in model.config.weak_encoders or []]
    routed = model.config.routed and not model.config.routes_frames
    return ExportCost(members, routed, total.weights, total.gflops)


def _assembled(section: ModelSection) -> tuple[MoweForConditionalGeneration, dict[str, str], list[str]]:
    """Return the model, the file that each stand-in is missing by part, and notes."""
    sources = {"base_encoder": section.base_encoder} | {
        f"weak_encoders.{weak.name}": weak.checkpoint for weak in section.weak_encoders
    }
    on_meta = {name: encoder_on_meta(_plain(source)) for name, source in sources.items()}
    missing = {name: f"config.json of {sources[name]}" for name, encoder in on_meta.items() if encoder is None}
    encoders = [encoder or _stand_in_encoder() for encoder in on_meta.values()]
    language_model, note = _language_model(section.language_model)
    if language_model is None:
        missing["language_model"] = f"config.json of {section.language_model}"
        language_model = language_model_on_meta(_STAND_IN_DECODER)
        assert language_model is not None
    base, *pool = encoders
    config = MoweConfig(
        base_encoder=EncoderSpec(
            "base",
            base.config,
            base.front_end,
            section.train_base,
            "last" if "base_encoder" in missing else section.base_encoder_features,
        ),
        weak_encoders=[
            EncoderSpec(
                weak.name,
                encoder.config,
                encoder.front_end,
                weak.train,
                "last" if f"weak_encoders.{weak.name}" in missing else weak.features,
            )
            for weak, encoder in zip(section.weak_encoders, pool, strict=True)
        ],
        text_config=copy.deepcopy(language_model.config),
        **architecture_options(section),
        **_run_options(section),
    )
    return MoweForConditionalGeneration(config, base, pool, language_model), missing, [note] if note else []


def _run_options(section: ModelSection) -> dict[str, Any]:
    """Return what decides which encoders run on how much audio, and shapes no weights."""
    top_k = min(section.router.top_k, max(1, len(section.weak_encoders)))
    return {"router_top_k": top_k, "router_execution": section.router.execution, "pad_audio": section.pad_audio}


def _exported(section: ModelSection, folder: str) -> MoweForConditionalGeneration:
    """Return an export's architecture with this configuration's choice of what trains."""
    try:
        config = MoweConfig.from_pretrained(folder, **_run_options(section))
    except OSError as error:
        raise ValueError(f"model.init_from: cannot read an export from {folder!r}: {error}") from error
    choices = {weak.name: weak.train for weak in section.weak_encoders}
    assert isinstance(config.base_encoder, EncoderSpec)
    config.base_encoder = replace(config.base_encoder, train=section.train_base)
    config.weak_encoders = [
        replace(spec, train=choices.get(spec.name, "frozen")) for spec in config.weak_encoders or []
    ]
    config.lora = {}
    return MoweForConditionalGeneration(config)


def _language_model(source: str | InlineConfig) -> tuple[PreTrainedModel | None, str | None]:
    """Return the language model with its embeddings as training will have them, and what is unsure about that."""
    if isinstance(source, InlineConfig):
        model = language_model_on_meta({"vocab_size": DEFAULT_VOCABULARY, **source.config})
        if "vocab_size" in source.config:
            return model, None
        return model, f"language_model: its tokenizer is trained on the data, up to {DEFAULT_VOCABULARY} tokens"
    model = language_model_on_meta(source)
    if model is None:
        return None, None
    tokens = _tokens_with_audio(source)
    if tokens is None:
        needs = f"unknown (needs tokenizer.json of {source})"
        return model, f"language_model: whether the audio token adds a row of embeddings is {needs}"
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    if tokens > embeddings.num_embeddings:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model, None


@cache  # a tokenizer of 260,000 tokens takes seconds to read, and the points of a study share theirs
def _tokens_with_audio(source: str) -> int | None:
    """Return how many tokens a tokenizer has with the audio token; None if it is not on this machine."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError):  # the message would only say so in other words
        return None
    add_audio_token(tokenizer)
    return len(tokenizer)


def _plain(source: str | InlineConfig) -> str | Mapping[str, Any]:
    return source if isinstance(source, str) else source.config


def _stand_in_encoder() -> AudioEncoder:
    encoder = encoder_on_meta(_STAND_IN_ENCODER)
    assert encoder is not None
    return encoder


def _parts(model: MoweForConditionalGeneration, missing: Mapping[str, str], tokens: int) -> list[PartCost]:
    """Count every parameter into its part; parts that depend on a stand-in keep no numbers."""
    specs: list[EncoderSpec] = model.config.weak_encoders or []
    members = len(specs)
    weights: dict[str, list[float]] = {}
    trainable: dict[str, int] = {}
    holders: dict[str, set[str]] = {}
    part_of = parameter_parts(model)
    for name, parameter in model.named_parameters():
        member = re.match(r"audio_tower\.pool\.members\.(\d+)\.", name)
        owner = part_of[name] + (f".{specs[int(member[1])].name}" if member and ".encoder." in name else "")
        row = "lora" if "lora_" in name else "projections" if member and owner == "adapter" else owner
        counts = weights.setdefault(row, [0.0] * (members + 1))
        counts[int(member[1]) + 1 if member else 0] += parameter.numel()
        trainable[row] = trainable.get(row, 0) + parameter.numel() * parameter.requires_grad
        holders.setdefault(row, set()).add(owner)
    pool = [f"weak_encoders.{spec.name}" for spec in specs]
    work = part_gflops(model, CLIP_S, tokens)
    parts = []
    for row in ("base_encoder", *pool, "routers", "projections", "adapter", "language_model", "lora"):
        if row not in weights:
            continue
        depends = {
            "routers": {"base_encoder"},
            "projections": {"base_encoder", *pool},
            "adapter": {"base_encoder", "language_model"},
            "lora": holders[row],
        }.get(row, {row})
        needs = tuple(missing[part] for part in sorted(depends & missing.keys()))
        # The base encoder's frame rate decides how many tokens the language model sees.
        timed = row in work and not ({"base_encoder", row} if row == "language_model" else depends) & missing.keys()
        parts.append(
            PartCost(
                row,
                None if needs else Amount(weights[row][0], tuple(weights[row][1:])),
                None if needs else trainable[row],
                work[row] if timed else None,
                needs,
            )
        )
    return parts
