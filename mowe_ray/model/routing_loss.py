"""L_MoWE: the loss on the routers, over the global batch and with its exact gradient.

Legend: N decisions of the data-dependent router in the global batch (clips, or frames), M pool members, q independent
and p_i dependent probabilities (softmax before top-k), p the mean of p_i, f the share of dispatches each member got,
H entropy.

    entropy_diversity   confidence mean_i H(p_i), diversity -H(p), commitment H(q)
    load_balance        M sum_m f_m p_m               Switch Transformer, arXiv 2101.03961
    importance_cv2      Var_m(p_m) / Mean_m(p_m)^2    Shazeer et al., arXiv 1701.06538
    z                   mean_i lse(logits_i)^2        ST-MoE, arXiv 2202.08906; both routers

The paper adds its L_MoWE with weight 0.1 [paper]; its formula could not be read: the first line is a reconstruction
[ours]. Confidence + diversity is minus the mutual information between clip and encoder; for the evidence see
docs/routing.md.

A micro-batch sees only its own clips, yet H(p) is not a sum over clips. With the totals of the
global batch known beforehand, `p = (totals + local - local.detach()) / N` has the global value and
passes the gradient on to the local clips: the gradients of all micro-batches add up to the exact
one. So that the values add up too, each micro-batch reports its share, local decisions / N, of the
terms that are not sums over decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .registry import Registry
from .routing import Routing, RoutingRecord

LOSS_PARTS = ("confidence", "diversity", "commitment")


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over the decisions of a (global) batch, of the data-dependent router.

    Attributes:
        probability_sum: (M,) sum of the softmax probabilities.
        dispatch_sum: (M,) how many decisions chose each member.
        clips: () number of decisions: clips, or frames if there is one for each.
    """

    probability_sum: Tensor
    dispatch_sum: Tensor
    clips: Tensor

    @classmethod
    def of(cls, routing: Routing) -> RoutingTotals:
        """Sum one micro-batch's decisions (C, M) or (C, T, M)."""
        probabilities = routing.whole_pool.detach()
        return cls(
            routing.total(probabilities),
            routing.total(routing.chosen.to(probabilities.dtype)),
            routing.count.to(probabilities),
        )

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        """Join two batches."""
        return RoutingTotals.from_vector(self.to_vector() + other.to_vector())

    def to_vector(self) -> Tensor:
        """Flatten to (2M + 1,), which is what ranks all-reduce by summing."""
        return torch.cat([self.probability_sum, self.dispatch_sum, self.clips[None]])

    @classmethod
    def from_vector(cls, vector: Tensor) -> RoutingTotals:
        """Undo `to_vector`."""
        members = (len(vector) - 1) // 2
        return cls(vector[:members], vector[members:-1], vector[-1])


@dataclass(frozen=True)
class GlobalRouting:
    """The routing of the global batch as a micro-batch sees it: global values, with the gradient of local clips.

    Attributes:
        independent: (M,) q; None if that router is off.
        dependent: The micro-batch's own decisions; None if that router is off.
        mean: (M,) p.
        dispatched: (M,) f, which has no gradient.
        share: () local decisions / N; 0 if no micro-batch has any.
        per_decision: () 1 / N.
    """

    independent: Tensor | None
    dependent: Routing | None
    mean: Tensor
    dispatched: Tensor
    share: Tensor
    per_decision: Tensor

    def average(self, values: Tensor) -> Tensor:
        """Return this micro-batch's part of the mean of `values`, one for each local decision."""
        assert self.dependent is not None
        return self.per_decision * self.dependent.total(values)

    def once(self, term: Tensor) -> Tensor:
        """Return this micro-batch's part of a function of `mean`: `share` of the value; the gradient is local."""
        return term - (1.0 - self.share) * term.detach()


ROUTING_LOSSES: Registry[Callable[[GlobalRouting], dict[str, Tensor]]] = Registry("training.mowe_loss.kind")
"""Routing loss by name: from the routing to the loss's parts by name, each made by `average`, `once` or `share`."""


class RoutingLoss(NamedTuple):
    """A micro-batch's share of the global routing loss, and of its parts without their weights."""

    total: Tensor
    parts: dict[str, Tensor]


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis; 0 log 0 = 0, with a finite gradient."""
    smallest = torch.finfo(probabilities.dtype).tiny
    # entr is exact at 0, but its derivative is infinite there.
    terms: Tensor = torch.special.entr(probabilities.clamp_min(smallest))
    return terms.sum(-1)


@ROUTING_LOSSES.register("entropy_diversity")
def entropy_diversity(routing: GlobalRouting) -> dict[str, Tensor]:
    """Be sure for each clip, differ over clips, commit to one choice for all: the default [ours]."""
    parts = {}
    if routing.dependent is not None:
        parts["confidence"] = routing.average(entropy(routing.dependent.whole_pool))
        parts["diversity"] = -routing.once(entropy(routing.mean))
    if routing.independent is not None:
        parts["commitment"] = routing.share * entropy(routing.independent)
    return parts


@ROUTING_LOSSES.register("load_balance")
def load_balance(routing: GlobalRouting) -> dict[str, Tensor]:
    """Send every member as many clips."""
    _needs_dependent(routing, "load_balance")
    return {"load_balance": routing.once(len(routing.mean) * (routing.dispatched * routing.mean).sum())}


@ROUTING_LOSSES.register("importance_cv2")
def importance_cv2(routing: GlobalRouting) -> dict[str, Tensor]:
    """Give every member as much probability."""
    _needs_dependent(routing, "importance_cv2")
    smallest = torch.finfo(routing.mean.dtype).tiny
    spread = routing.mean.var(correction=0) / routing.mean.mean().square().clamp(min=smallest)
    return {"importance_cv2": routing.once(spread)}


@ROUTING_LOSSES.register("none")
def no_loss(routing: GlobalRouting) -> dict[str, Tensor]:
    """Leave the routers to the language model's loss."""
    return {}


def _needs_dependent(routing: GlobalRouting, kind: str) -> None:
    if routing.dependent is None:
        raise ValueError(
            f"training.mowe_loss.kind={kind} regulates the data-dependent router, which is off: "
            "set model.router.data_dependent=true, or another loss"
        )


def routing_loss(
    record: RoutingRecord,
    *,
    kind: str,
    z_weight: float = 0.0,
    weights: Mapping[str, float] | None = None,
    totals: RoutingTotals | None = None,
) -> RoutingLoss:
    """Return this micro-batch's share of the global routing loss.

    Args:
        record: Decisions for this micro-batch's clips.
        kind: One of `ROUTING_LOSSES`; see the module's formulas.
        z_weight: Weight of the z term relative to the main one.
        weights: Factor on each part by name; 1 for parts that are not named.
        totals: Sums over the global batch; None means this micro-batch is all of it.

    Raises:
        ValueError: if `kind` is unknown, or regulates a router that is off.
    """
    formula = ROUTING_LOSSES.find(kind)
    if not record.routings:
        return RoutingLoss(torch.zeros(()), {})
    routing = _over_global_batch(record, totals)
    parts = formula(routing)
    if z_weight:
        parts["z"] = _z_loss(record, routing)
    # Without clips, and under a loss of none, the routers still take part in the backward pass, with a zero gradient.
    loss = sum((r.logits.sum() * 0 for r in record.routings), start=torch.zeros_like(routing.share))
    for name, part in parts.items():
        loss = loss + {"z": z_weight, **(weights or {})}.get(name, 1.0) * part
    return RoutingLoss(loss, {name: part.detach() for name, part in parts.items()})


def _over_global_batch(record: RoutingRecord, totals: RoutingTotals | None) -> GlobalRouting:
    logits, dependent = record.routings[0].logits, record.dependent
    if totals is None and dependent is not None:
        totals = RoutingTotals.of(dependent)
    own = logits.new_full((), record.clips) if dependent is None else dependent.count.to(logits)
    # Never divides by zero: without clips every numerator below is zero as well. Tensors, because reading the number
    # of clips would make the host wait for the device.
    at_least_one = (own if totals is None else totals.clips).to(logits).clamp(min=1.0)
    share, per_decision = own / at_least_one, 1.0 / at_least_one
    independent = None if record.independent is None else record.independent.whole_pool
    if dependent is None:
        nothing = logits.new_zeros(logits.shape[-1])
        return GlobalRouting(independent, None, nothing, nothing, share, per_decision)
    assert totals is not None
    local = dependent.total(dependent.whole_pool)
    mean = (totals.probability_sum.to(local) + local - local.detach()) * per_decision
    dispatched = totals.dispatch_sum.to(local)
    fraction = dispatched / dispatched.sum().clamp(min=1.0)
    return GlobalRouting(independent, dependent, mean, fraction, share, per_decision)


def _z_loss(record: RoutingRecord, routing: GlobalRouting) -> Tensor:
    loss = torch.zeros_like(routing.share)
    if record.independent is not None:
        loss = loss + routing.share * record.independent.logits.logsumexp(-1).square()
    if record.dependent is not None:
        loss = loss + routing.average(record.dependent.logits.logsumexp(-1).square())
    return loss
