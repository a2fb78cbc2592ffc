"""Parameters and operations of a configured model, counted on PyTorch's meta device before any weight exists.

A checkpoint whose configuration is out of reach gets a tiny stand-in, so that the rest can still be
built; every number that depends on the stand-in is reported as unknown, with the file it needs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, PreTrainedModel

from mowe_ray.config.fields import InlineConfig
from mowe_ray.config.model_section import ModelSection
from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.building import add_audio_token, make_trainable, parameter_parts
from mowe_ray.model.configuration_mowe import EncoderSpec, MoweConfig
from mowe_ray.model.cost import encoder_cost, encoder_on_meta, language_model_cost, language_model_on_meta
from mowe_ray.model.encoders import AudioEncoder
from mowe_ray.model.export import open_exported
from mowe_ray.training.build import DEFAULT_VOCABULARY, lora_of

CLIP_S = 30.0

# Any small configuration will do: no number that depends on a stand-in is reported.
_STAND_IN_ENCODER = {"model_type": "whisper", "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1}
_STAND_IN_DECODER = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


@dataclass(frozen=True)
class Amount:
    """Weights or work: what every clip needs, and what each of the M pool members adds when it runs."""

    always: float
    members: tuple[float, ...]

    @property
    def total(self) -> float:
        """All of it: what is stored, or what a dense execution does."""
        return self.always + sum(self.members)

    def active(self, running: tuple[int, int]) -> tuple[float, float]:
        """Return the range that one clip uses, when between `running[0]` and `running[1]` members run."""
        ascending = sorted(self.members)
        fewest, most = running
        return self.always + sum(ascending[:fewest]), self.always + sum(ascending[len(ascending) - most :])

    def expected(self, share: float) -> float:
        """Return the mean over clips for uniform routers, where each member runs for `share` of the clips."""
        return self.at([share] * len(self.members))

    def at(self, loads: Sequence[float]) -> float:
        """Return the mean over clips when member m runs for `loads[m]` of the clips."""
        return self.always + sum(load * member for load, member in zip(loads, self.members, strict=True))

    def __add__(self, other: Amount) -> Amount:
        """Add part by part."""
        return Amount(
            self.always + other.always, tuple(a + b for a, b in zip(self.members, other.members, strict=True))
        )


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
        parts: All parts of the model.
        running: Pool members that run for one clip, at least and at most.
        expected_share: Share of the clips a member runs for while the routers are undecided.
        audio_tokens: Tokens of the language model that a clip of `CLIP_S` becomes; None if unknown.
        notes: What the numbers leave out.
    """

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
    config = model.config
    members = len(config.weak_encoders or [])
    routers = config.router_data_independent + config.router_data_dependent
    k = min(section.router.top_k, members)
    if config.fusion != "routed" or section.router.execution == "dense":
        running, share = (members, members), 1.0
    else:
        running = k, min(members, k * routers)
        # While undecided, each router chooses a member with probability k / M, independently; it runs if any of them
        # does.
        share = 1.0 - (1.0 - k / members) ** routers if members else 0.0
    tokens = _audio_tokens(model)
    parts = _parts(model, missing, tokens)
    return Estimate(parts, running, share, None if "base_encoder" in missing else tokens, notes)


@dataclass(frozen=True)
class ExportCost:
    """The cost of an exported model.

    Attributes:
        members: Names of the M pool members.
        routed: Whether routers choose among them; else all run for every clip.
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
    total = Estimate(_parts(model, {}, _audio_tokens(model)), (0, 0), 0.0, None, []).total
    assert total.weights is not None
    assert total.gflops is not None
    members = [spec.name for spec in model.config.weak_encoders or []]
    return ExportCost(members, model.config.routed, total.weights, total.gflops)


def _audio_tokens(model: MoweForConditionalGeneration) -> int:
    """Return the tokens of the language model that a clip of `CLIP_S` becomes."""
    frames = model.audio_tower.base_encoder.num_frames(round(CLIP_S * SAMPLE_RATE))
    return int(-(-frames // model.config.downsample))


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
        base_encoder=EncoderSpec("base", base.config, base.front_end, section.train_base),
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
        fusion=section.fusion,
        router_data_independent=section.router.data_independent,
        router_data_dependent=section.router.data_dependent,
        adapter=section.adapter.kind,
        downsample=section.adapter.downsample,
    )
    return MoweForConditionalGeneration(config, base, pool, language_model), missing, [note] if note else []


def _exported(section: ModelSection, folder: str) -> MoweForConditionalGeneration:
    """Return an export's architecture with this configuration's choice of what trains."""
    try:
        config = MoweConfig.from_pretrained(folder)
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError):  # not cached; the message would only say so in other words
        needs = f"unknown (needs tokenizer.json of {source})"
        return model, f"language_model: whether the audio token adds a row of embeddings is {needs}"
    add_audio_token(tokenizer)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, None


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
    work = _work(model, tokens)
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


def _work(model: MoweForConditionalGeneration, tokens: int) -> dict[str, Amount]:
    """Return the work of each part for one clip of `CLIP_S`; LoRA counts with the module it is in."""
    tower, config = model.audio_tower, model.config
    pool = list(tower.pool or ())
    none = [0.0] * len(pool)
    samples = round(CLIP_S * SAMPLE_RATE)
    frames = torch.tensor([tower.base_encoder.num_frames(samples)], device="meta")
    features = torch.empty(1, tower.base_encoder.num_frames(samples), tower.base_encoder.width, device="meta")
    work = {"base_encoder": Amount(encoder_cost(tower.base_encoder, CLIP_S).gflops, tuple(none))}
    projections = list(none)
    for i, (spec, member) in enumerate(zip(config.weak_encoders or [], pool, strict=True)):
        # Only this member's entry: a clip that does not choose it does none of its work.
        own = list(none)
        own[i] = encoder_cost(member.encoder, CLIP_S).gflops
        work[f"weak_encoders.{spec.name}"] = Amount(0.0, tuple(own))
        states = torch.empty(1, member.encoder.num_frames(samples), member.encoder.width, device="meta")
        projections[i] = _gflops(member.projection, states)
    work["projections"] = Amount(0.0, tuple(projections))
    if tower.dependent_router is not None:
        work["routers"] = Amount(_gflops(tower.dependent_router, features, frames), tuple(none))
    # Every block has the base features' width, and the count depends on shapes alone.
    fused = torch.cat([features] * config.num_blocks, dim=-1)
    work["adapter"] = Amount(_gflops(tower.adapter, fused, frames), tuple(none))
    work["language_model"] = Amount(language_model_cost(model.language_model, tokens).gflops, tuple(none))
    return work


def _gflops(module: torch.nn.Module, *inputs: torch.Tensor) -> float:
    # With gradients: the counter cannot follow a trainable tensor's view that has no graph (Q-Former's queries).
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops()) / 1e9
