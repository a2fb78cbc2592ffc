"""The `model` section: encoders, routers, adapter and language model."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mowe_ray.config.fields import (
    CheckpointSource,
    InlineConfig,
    Location,
    Name,
    Probability,
    Section,
    Texts,
    TrainMode,
    refuse,
    repeated_names,
)
from mowe_ray.config.plugins import NameIn, registered

CheckpointedPart = Literal["base_encoder", "weak_encoders", "language_model"]
DENSE_FUSIONS = ("concat", "average")  # which run all members, without routers
FUSIONS = ("routed", "sum", "cross_attention", "latents", *DENSE_FUSIONS)


def _known_features(features: str) -> str:
    if not re.fullmatch(r"last|weighted_sum|layer:\d+|layers:\[\d+(, ?\d+)*\]", features):
        raise ValueError(f"must be last, weighted_sum, layer:N or layers:[N, M], got {features!r}")
    return features


Features = Annotated[str, AfterValidator(_known_features)]


class WeakEncoderSection(Section):
    """One member of the pool of weak encoders."""

    name: Name
    """Name in metrics and reports, unique within the pool."""
    checkpoint: CheckpointSource
    """Weights: a hub id, a folder, or {config: {...}} for random ones."""
    train: TrainMode = "frozen"
    """Trainable weights: none, all, or low-rank updates (sizes from model.lora)."""
    features: Features = "last"
    """Hidden states: last, layer:N (0: the first's input), a learned sum of layers:[N, M] or of all: weighted_sum."""


class RouterSection(Section):
    """Routers, which select weak encoders for each clip."""

    kind: Annotated[str, NameIn("model.router.kind", ("mlp",))] = "mlp"
    """Network of the data-dependent router."""
    input: Literal["audio", "prompt", "audio+prompt"] = "audio"
    """What the data-dependent router reads: mean base feature, mean embedding of the instruction's tokens, or both."""
    hidden: NonNegativeInt = 0
    """Units of a hidden layer of the data-dependent router; 0 is linear."""
    granularity: Literal["clip", "frame"] = "clip"
    """Whether the data-dependent router decides once a clip or for each frame, which runs what any frame needs."""

    top_k: PositiveInt = 1
    """Number of weak encoders that each router selects per clip."""
    data_independent: bool = True
    """Use the router that chooses the same encoders for every clip."""
    data_dependent: bool = True
    """Use the router that chooses per clip from the base features."""
    temperature: PositiveFloat = 1.0
    """Router logits are divided by this before the softmax: above 1 flattens the choice."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise on the router logits, in training only."""
    execution: Literal["sparse", "dense"] = "sparse"
    """Run only the chosen encoders (sparse), or all of them and mask (dense, for comparison)."""


class AdapterSection(Section):
    """The network between audio features and language model."""

    kind: Annotated[str, NameIn("model.adapter.kind", ("seqcnn", "stack_mlp", "qformer", "moe_mlp"))] = "seqcnn"
    """Strided convolutions, stacked frames through an MLP or four merged ones, or queries attending to windows."""
    downsample: PositiveInt = 8
    """Audio frames (50 per second for Whisper) that become one token of the language model."""


class LoraSection(Section):
    """Low-rank updates of the language model, and of encoders whose train is lora."""

    r: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 16
    """The update is scaled by alpha / r."""
    dropout: Probability = 0.0
    """Dropout on the input of the update."""
    target_modules: Texts = "all-linear"
    """Layers of the language model: all-linear, a regular expression, or a list of names."""
    merge: bool = True
    """Add the update to the weights of the export; false keeps it apart, exact in bfloat16, and readers need peft."""


class SpecAugmentSection(Section):
    """Time masks on the base encoder's log-mel features, in training only."""

    mask_prob: Probability = 0.05
    """Share of the frames that starts a mask, times mask_length: roughly the share masked."""
    mask_length: PositiveInt = 20
    """Length of a mask, in mel frames of 10 ms."""


class ModelSection(Section):
    """Architecture, initial weights, and which of them train."""

    init_from: Location | None = None
    """MoWE export (folder or hub id) whose weights training starts from; same architecture."""
    base_encoder: CheckpointSource
    """Strong audio encoder: a hub id, a folder, or {config: {...}} for random weights."""
    base_encoder_features: Features = "last"
    """Its hidden states that are used, as for weak encoders."""
    weak_encoders: list[WeakEncoderSection] = []
    """Pool of weak encoders; empty trains the baseline without a pool."""
    router: RouterSection = RouterSection()
    fusion: Annotated[str, NameIn("model.fusion", FUSIONS)] = "routed"
    """How the pool joins the base: beside it, added, attended to, as tokens; without routers: concat, average."""
    latents: PositiveInt = 4
    """Audio tokens of each chosen weak encoder, for fusion: latents."""
    adapter: AdapterSection = AdapterSection()
    language_model: CheckpointSource
    """Causal language model: a hub id, a folder, or {config: {...}} for random weights."""
    lora: LoraSection | None = LoraSection()
    """Low-rank training of the language model; null trains all of its weights."""
    train_base: TrainMode = "frozen"
    """Trainable weights of the base encoder: none, all, or low-rank updates."""
    pad_audio: Literal["bucket", "full30"] = "bucket"
    """Whisper input length: the batch's own length bucket, or always 30 s. Kept in the export."""
    spec_augment: SpecAugmentSection | None = None
    """Time masks on the base encoder's input; null disables them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the network; auto is bfloat16 on a GPU and float32 on a CPU."""
    gradient_checkpointing: list[CheckpointedPart] = []
    """Parts that recompute activations in the backward pass: less memory for a third more compute."""

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSection:
        members, router = self.weak_encoders, self.router
        repeated = repeated_names([member.name for member in members])
        routed = self._takes_routers and bool(members)
        needs_lora = [f"model.weak_encoders.{i}.train" for i, m in enumerate(members) if m.train == "lora"]
        if self.train_base == "lora":
            needs_lora.append("model.train_base")
        refuse(
            f"model.weak_encoders: names must be unique, repeated: {', '.join(repeated)}" if repeated else None,
            f"model.router.top_k: {router.top_k} is more than the {len(members)} weak encoders"
            if routed and router.top_k > len(members)
            else None,
            f"model.router.data_dependent: {self.fusion} fusion needs data_independent, data_dependent or both"
            if routed and not (router.data_independent or router.data_dependent)
            else None,
            "model.router.granularity: by the prompt alone all frames of a clip are routed alike; "
            "set model.router.input=audio+prompt, or granularity=clip"
            if routed and router.data_dependent and router.granularity == "frame" and router.input == "prompt"
            else None,
            *(f"{key}: lora takes its rank from model.lora, which is null" for key in needs_lora if self.lora is None),
        )
        return self

    @property
    def _takes_routers(self) -> bool:
        """Whether routers choose the members that the fusion joins."""
        by_plugin = registered("model.fusion").get(self.fusion)
        return self.fusion not in DENSE_FUSIONS if by_plugin is None else bool(by_plugin.routed)

    @property
    def merges_lora(self) -> bool:
        """Whether exports hold merged weights."""
        return self.lora is None or self.lora.merge

    def warnings(self) -> list[str]:
        """Return warnings about valid but probably unintended values, one `key: what` line each."""
        lines = []
        first_with: dict[tuple[str, str], str] = {}
        for position, member in enumerate(self.weak_encoders):
            if member.train != "frozen":
                continue
            key = f"model.weak_encoders.{position}"
            if isinstance(member.checkpoint, InlineConfig):
                if member.checkpoint.is_random:
                    lines.append(f"{key}.train: {member.name} has random weights and is frozen")
                continue
            twin = first_with.setdefault((member.checkpoint, member.features), member.name)
            if twin != member.name:
                lines.append(f"{key}.train: {member.name} is a frozen copy of {twin} and adds no information")
        base = self.base_encoder
        if isinstance(base, InlineConfig) and base.is_random and self.train_base == "frozen":
            lines.append("model.train_base: the base encoder has random weights and is frozen")
        return lines + self._needless_checkpointing()

    def _needless_checkpointing(self) -> list[str]:
        idle = {"base_encoder": "is frozen"} if self.train_base == "frozen" else {}
        if all(member.train == "frozen" for member in self.weak_encoders):
            idle["weak_encoders"] = "are all frozen" if self.weak_encoders else "are none"
        return [
            f"model.gradient_checkpointing: {part} {idle[part]}, so there are no activations to save"
            for part in self.gradient_checkpointing
            if part in idle
        ]
