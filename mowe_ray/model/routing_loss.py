"""L_MoWE: the loss on the routers, over the global batch and with its exact gradient.

Legend: N clips of the global batch, M pool members, q independent and p_i dependent probabilities
(softmax before top-k), p the mean of p_i, f the share of dispatches each member got, H entropy.

    entropy_diversity   H(q) + mean_i H(p_i) - H(p)   commit; be sure per clip, differ over clips
    load_balance        M sum_m f_m p_m               Switch Transformer, arXiv 2101.03961
    importance_cv2      Var_m(p_m) / Mean_m(p_m)^2    Shazeer et al., arXiv 1701.06538
    z                   mean_i lse(logits_i)^2        ST-MoE, arXiv 2202.08906; both routers

The paper adds its L_MoWE with weight 0.1 [paper]; its formula could not be read: the first line
is a reconstruction [ours].

A micro-batch sees only its own clips, yet H(p) is not a sum over clips. With the totals of the
global batch known beforehand, `p = (totals + local - local.detach()) / N` has the global value and
passes the gradient on to the local clips: the gradients of all micro-batches add up to the exact
one. So that the values add up too, each micro-batch reports its share, local clips / N, of the
terms that are not sums over clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .routing import Routing, RoutingRecord

LOSS_KINDS = ("entropy_diversity", "load_balance", "importance_cv2", "none")


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over the clips of a (global) batch, of the data-dependent router.

    Attributes:
        probability_sum: (M,) sum of the softmax probabilities.
        dispatch_sum: (M,) how many clips chose each member.
        clips: () number of clips.
    """

    probability_sum: Tensor
    dispatch_sum: Tensor
    clips: Tensor

    @classmethod
    def of(cls, routing: Routing) -> RoutingTotals:
        """Sum one micro-batch's decisions (C, M)."""
        probabilities = routing.probabilities.detach()
        return cls(
            probabilities.sum(0),
            routing.chosen.to(probabilities.dtype).sum(0),
            probabilities.new_full((), len(probabilities)),
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


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis; 0 log 0 = 0, with a finite gradient."""
    smallest = torch.finfo(probabilities.dtype).tiny
    # entr is exact at 0, but its derivative is infinite there.
    terms: Tensor = torch.special.entr(probabilities.clamp_min(smallest))
    return terms.sum(-1)


def routing_loss(
    record: RoutingRecord, *, kind: str, z_weight: float = 0.0, totals: RoutingTotals | None = None
) -> Tensor:
    """Return this micro-batch's share of the global routing loss, a scalar in the routers' dtype.

    Args:
        record: Decisions for this micro-batch's clips.
        kind: One of `LOSS_KINDS`; see the module's formulas.
        z_weight: Weight of the z term relative to the main one.
        totals: Sums over the global batch; None means this micro-batch is all of it.

    Raises:
        ValueError: if `kind` is unknown, or regulates a router that is off.
    """
    if kind not in LOSS_KINDS:
        raise ValueError(f"training.mowe_loss.kind: unknown loss {kind!r}; known are {', '.join(LOSS_KINDS)}")
    routers = [routing for routing in (record.independent, record.dependent) if routing is not None]
    if not routers:
        return torch.zeros(())
    if totals is None and record.dependent is not None:
        totals = RoutingTotals.of(record.dependent)
    total_clips = routers[0].logits.new_full((), record.clips) if totals is None else totals.clips
    # Never divides by zero: without clips every numerator below is zero as well. Tensors, because reading the number
    # of clips would make the host wait for the device.
    at_least_one = total_clips.to(routers[0].logits).clamp(min=1.0)
    share, per_clip = record.clips / at_least_one, 1.0 / at_least_one
    # Without clips the routers still take part in the backward pass, with a zero gradient.
    loss = sum(
        (routing.logits.sum() * 0 for routing in routers),
        start=torch.zeros_like(routers[0].logits.sum()),
    )
    if record.independent is not None:
        if kind == "entropy_diversity":
            loss = loss + share * entropy(record.independent.probabilities)
        loss = loss + z_weight * share * record.independent.logits.logsumexp(-1).square()
    if record.dependent is not None:
        assert totals is not None
        loss = loss + _batch_term(record.dependent, kind, totals, share, per_clip)
        loss = loss + z_weight * per_clip * record.dependent.logits.logsumexp(-1).square().sum()
    elif kind in ("load_balance", "importance_cv2"):
        raise ValueError(
            f"training.mowe_loss.kind={kind} regulates the data-dependent router, which is off: "
            "set model.router.data_dependent=true, or another loss"
        )
    return loss


def _batch_term(routing: Routing, kind: str, totals: RoutingTotals, share: Tensor, per_clip: Tensor) -> Tensor:
    """Return the share of the term over the dependent router's (C, M) decisions; zero if no batch has clips."""
    if kind == "none":
        return routing.probabilities.sum() * 0
    local = routing.probabilities.sum(0)
    # Global value, local gradient.
    mean = (totals.probability_sum.to(local) + local - local.detach()) * per_clip
    if kind == "entropy_diversity":
        return per_clip * entropy(routing.probabilities).sum() - _value_share(entropy(mean), share)
    if kind == "load_balance":
        dispatched = totals.dispatch_sum.to(local)
        fraction = dispatched / dispatched.sum().clamp(min=1.0)
        return _value_share(len(mean) * (fraction * mean).sum(), share)
    smallest = torch.finfo(mean.dtype).tiny
    return _value_share(mean.var(correction=0) / mean.mean().square().clamp(min=smallest), share)


def _value_share(term: Tensor, share: Tensor) -> Tensor:
    """Scale a term's value by `share`, but not its gradient, which is local already."""
    return term - (1.0 - share) * term.detach()
