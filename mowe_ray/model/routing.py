"""The two routers: selection and weights of the weak encoders that run for a clip, or for each of its frames.

    independent   p   = softmax(v / temperature)        v a learnable vector: one choice for all clips
    dependent     p_i = softmax(f(x_i) / temperature)   f linear, or with a hidden layer

x_i is the mean base feature of clip i's frames (`audio`), the mean token embedding of the instruction that the clip
comes with (`prompt`), or both, one behind the other; with a choice per frame, a frame's own base feature. The K most
probable members are run, each weighted by its probability.

Legend: C clips, T base frames, D base width, M pool members, W width of the language model, I width of what a router
reads; `...` stands for nothing (one decision for all clips), C (one for each clip) or C, T (one for each frame).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import Registry

ROUTER_INPUTS = ("audio", "prompt", "audio+prompt")
GRANULARITIES = ("clip", "frame")

ROUTERS: Registry[type[nn.Module]] = Registry("model.router.kind")
"""Class of the data-dependent router by name.

It is called with I, M and `model.router.hidden`, and maps float32 inputs (..., I) to float32 logits (..., M), whatever
the type of its weights. Weights belong to the router itself or to submodules that it calls."""


def top_k_mask(probabilities: Tensor, k: int) -> Tensor:
    """Mark the `k` largest of the last axis; ties go to the lower index, on every rank alike."""
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order[..., :k], True)


def top_k_weights(probabilities: Tensor, k: int) -> Tensor:
    """Keep the `k` largest probabilities (..., M) and zero the rest, without renormalising.

    Renormalised, the single weight at K=1 is the constant 1, and the language model's loss gives
    the router no gradient [ours; the order of Switch Transformer, arXiv 2101.03961].
    """
    return probabilities * top_k_mask(probabilities, k)


def masked_mean(features: Tensor, valid: Tensor) -> Tensor:
    """Average features (C, T, D) over each clip's first `valid` (C,) frames, in float32."""
    mask = torch.arange(features.shape[1], device=features.device) < valid[:, None]
    return (features.float() * mask[..., None]).sum(1) / valid[:, None]


@dataclass(frozen=True)
class Routing:
    """One router's decisions: for all clips at once, for each of C clips, or for each of their T frames.

    Attributes:
        logits: (..., M) before temperature and noise, float32; without the leading axis if they are the same for all.
        probabilities: (..., M) softmax over the members that are present.
        chosen: (..., M) bool, the members that run; none for a frame of padding.
        unmasked: Softmax over all members, absent ones too, of the shape of the logits; None if none is absent.
        valid: (C, T) bool, which frames are no padding; None unless there is a decision for each frame.
    """

    logits: Tensor
    probabilities: Tensor
    chosen: Tensor
    unmasked: Tensor | None = None
    valid: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """Mixing weights (..., M): the probability of a chosen member, zero for the others."""
        return self.probabilities * self.chosen

    @property
    def whole_pool(self) -> Tensor:
        """What the router would do if no member were absent: the probabilities that the routing loss regulates."""
        return self.probabilities if self.unmasked is None else self.unmasked

    def per_clip(self, values: Tensor) -> Tensor:
        """Average values (C, T, ...) over each clip's frames; those of other decisions stay as they are."""
        if self.valid is None:
            return values
        return self._counted(values).sum(1) / self.valid.sum(1).view(-1, *[1] * (values.dim() - 2))

    def total(self, values: Tensor) -> Tensor:
        """Sum values (C, ...) or (C, T, ...) over the decisions."""
        return values.sum(0) if self.valid is None else self._counted(values).sum((0, 1))

    @property
    def count(self) -> Tensor:
        """Number of decisions, for clips or for frames."""
        clips = self.logits.new_full((), len(self.logits))
        return clips if self.valid is None else self.valid.sum().to(clips)

    def _counted(self, values: Tensor) -> Tensor:
        assert self.valid is not None
        return values * self.valid.view(*self.valid.shape, *[1] * (values.dim() - 2))

    def select(self, rows: slice | list[int]) -> Routing:
        """Return the decisions for some of the clips."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        # What has no leading axis holds for all clips.
        return Routing(**{n: part[rows] if part is not None and part.dim() > 1 else part for n, part in parts.items()})


@dataclass(frozen=True)
class RoutingRecord:
    """Decisions of both routers for the C clips of a micro-batch; None for a router that is off.

    Attributes:
        independent: One decision for all clips, or one per clip where members are absent for some of them.
        dependent: One decision per clip or frame; empty leading axis when the batch has no audio.
        clips: C.
    """

    independent: Routing | None
    dependent: Routing | None
    clips: int

    @property
    def routings(self) -> list[Routing]:
        """The routers that are on."""
        return [routing for routing in (self.independent, self.dependent) if routing is not None]

    def select(self, rows: list[int]) -> RoutingRecord:
        """Return the record of some of the clips."""
        independent, dependent = (r and r.select(rows) for r in (self.independent, self.dependent))
        return RoutingRecord(independent, dependent, len(rows))


class DataIndependentRouter(nn.Module):
    """A learnable vector of M logits: the same members for every clip [paper]."""

    def __init__(self, members: int):
        super().__init__()
        self.logits = nn.Parameter(torch.empty(members))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near uniform, but not on it: there the entropy has no gradient [ours]."""
        nn.init.normal_(self.logits, std=0.02)

    def forward(self) -> Tensor:
        """Return the logits (M,) in float32."""
        return self.logits.float()


@ROUTERS.register("mlp")
class DataDependentRouter(nn.Module):
    """A linear map from its input [paper: the clip's mean base feature] to M logits [ours], or a perceptron.

    Args:
        width: I.
        members: M.
        hidden: Units of a hidden layer with GELU; 0 for none.
    """

    def __init__(self, width: int, members: int, hidden: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, hidden or width))
        self.bias = nn.Parameter(torch.empty(members))
        # Plain tensors, not submodules, which would compute in their own type.
        self.inner_weight = nn.Parameter(torch.empty(hidden, width)) if hidden else None
        self.inner_bias = nn.Parameter(torch.empty(hidden)) if hidden else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small weights: early choices vary between clips, and no member is out of reach [ours]."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        if self.inner_weight is not None:
            nn.init.xavier_uniform_(self.inner_weight)
        if self.inner_bias is not None:
            nn.init.zeros_(self.inner_bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return float32 logits (..., M) for float32 inputs (..., I)."""
        if self.inner_weight is not None and self.inner_bias is not None:
            inputs = F.gelu(F.linear(inputs, self.inner_weight.float(), self.inner_bias.float()))
        return F.linear(inputs, self.weight.float(), self.bias.float())


def router_inputs(kind: str, features: Tensor, valid: Tensor, prompts: Tensor | None, *, per_frame: bool) -> Tensor:
    """Return what the data-dependent router reads, in float32.

    Args:
        kind: One of `ROUTER_INPUTS`.
        features: (C, T, D) base features.
        valid: (C,) frames of each clip.
        prompts: (C, W) mean token embedding of each clip's instruction; None where it is not read.
        per_frame: Whether there is a decision for each frame.

    Returns:
        (C, I), or per frame (C, T, I).
    """
    parts = []
    if "audio" in kind:
        parts.append(features.float() if per_frame else masked_mean(features, valid))
    if "prompt" in kind:
        assert prompts is not None
        # Embeddings of language models are tens of times smaller than base features: both come to unit variance [ours].
        scaled = F.layer_norm(prompts.float(), prompts.shape[-1:])
        parts.append(scaled[:, None].expand(-1, features.shape[1], -1) if per_frame else scaled)
    return torch.cat(parts, -1)


def route(
    logits: Tensor,
    *,
    k: int,
    temperature: float,
    noise: Tensor | None,
    chosen: Tensor | None = None,
    absent: Tensor | None = None,
    valid: Tensor | None = None,
) -> Routing:
    """Turn logits (..., M) into a decision.

    Args:
        logits: Of a router.
        k: Members to keep.
        temperature: Divides the logits; above 1 flattens the distribution.
        noise: Added to the scaled logits, for exploration in training.
        chosen: An earlier decision for the same clips to keep, (..., M) bool.
        absent: (M,) or (C, M) bool, members to do without: the others share their probability.
        valid: (C, T) bool, frames that are no padding, for a decision for each frame.
    """
    scaled = logits / temperature
    if noise is not None:
        scaled = scaled + noise
    probabilities = unmasked = scaled.softmax(-1)
    if absent is not None:
        # Where all are absent, softmax would be NaN, and so would its gradient.
        hidden = absent & ~absent.all(-1, keepdim=True)
        probabilities = torch.where(hidden, -torch.inf, scaled).softmax(-1) * ~absent
    if chosen is None:
        chosen = top_k_mask(probabilities, k)
        if absent is not None:
            chosen = chosen & ~absent
        if valid is not None:
            chosen = chosen & valid[..., None]
    return Routing(logits, probabilities, chosen, None if absent is None else unmasked, valid)
