"""The two routers: selection and weights of the weak encoders that run for a clip.

    independent   p   = softmax(v / temperature)     v a learnable vector: one choice for all clips
    dependent     p_i = softmax(W h_i / temperature) h_i the mean base feature of clip i's frames

The K most probable members are run, each weighted by its probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    """One router's decision for C clips (leading axis) or for all clips at once (no leading axis).

    Attributes:
        logits: (..., M) before temperature and noise, float32.
        probabilities: (..., M) softmax over all members.
        chosen: (..., M) bool, the members that run.
    """

    logits: Tensor
    probabilities: Tensor
    chosen: Tensor

    @property
    def weights(self) -> Tensor:
        """Mixing weights (..., M): the probability of a chosen member, zero for the others."""
        return self.probabilities * self.chosen


@dataclass(frozen=True)
class RoutingRecord:
    """Decisions of both routers for the C clips of a micro-batch; None for a router that is off.

    Attributes:
        independent: One decision for all clips.
        dependent: One decision per clip; empty leading axis when the batch has no audio.
        clips: C.
    """

    independent: Routing | None
    dependent: Routing | None
    clips: int

    def select(self, rows: list[int]) -> RoutingRecord:
        """Return the record of some of the clips."""
        dependent = self.dependent
        if dependent is not None:
            dependent = Routing(dependent.logits[rows], dependent.probabilities[rows], dependent.chosen[rows])
        return RoutingRecord(self.independent, dependent, len(rows))


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


class DataDependentRouter(nn.Module):
    """A linear map from a clip's mean base feature [paper] to M logits [ours]."""

    def __init__(self, width: int, members: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, width))
        self.bias = nn.Parameter(torch.empty(members))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small weights: early choices vary between clips, and no member is out of reach [ours]."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Return float32 logits (C, M) for features (C, T, D) with `valid` (C,) frames each."""
        return nn.functional.linear(masked_mean(features, valid), self.weight.float(), self.bias.float())


def route(
    logits: Tensor,
    *,
    k: int,
    temperature: float,
    noise: Tensor | None,
    chosen: Tensor | None = None,
    excluded_members: Sequence[int] = (),
) -> Routing:
    """Turn logits (..., M) into a decision.

    Args:
        logits: Of a router, for one clip a row.
        k: Members to keep.
        temperature: Divides the logits; above 1 flattens the distribution.
        noise: Added to the scaled logits, for exploration in training.
        chosen: An earlier decision for the same clips to keep, (..., M) bool.
        excluded_members: Indexes of members that are treated as absent: the others share their probability.
    """
    scaled = logits / temperature
    if noise is not None:
        scaled = scaled + noise
    if not excluded_members:
        probabilities = scaled.softmax(-1)
        return Routing(logits, probabilities, top_k_mask(probabilities, k) if chosen is None else chosen)
    assert chosen is None
    absent = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    absent[list(excluded_members)] = True
    # With all members excluded, the softmax is NaN.
    probabilities = scaled.masked_fill(absent, -torch.inf).softmax(-1).nan_to_num(0.0)
    return Routing(logits, probabilities, top_k_mask(probabilities, k) & ~absent)
