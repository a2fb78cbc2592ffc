"""Sums of routing decisions: small enough to all-reduce at every step, enough for load and entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mowe_ray.evaluation.predictions import Answer, by_task
from mowe_ray.model import RoutingRecord
from mowe_ray.model.routing_loss import entropy


@dataclass(frozen=True)
class RoutingSums:
    """Decisions over some clips, with M pool members; a router that is off has all zeros.

    Attributes:
        dependent_chosen: (M,) clips for which the data-dependent router chose each member.
        dependent_probability: (M,) sum of its probabilities over clips.
        dependent_entropy: sum over clips of the entropy of its distribution, in nats.
        independent_chosen: (M,) clips that got each member from the data-independent router.
        independent_probability: (M,) its probabilities, times the number of clips.
        independent_entropy: entropy of its distribution, times the number of clips.
        clips: number of clips.
    """

    dependent_chosen: torch.Tensor
    dependent_probability: torch.Tensor
    dependent_entropy: torch.Tensor
    independent_chosen: torch.Tensor
    independent_probability: torch.Tensor
    independent_entropy: torch.Tensor
    clips: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, record: RoutingRecord | None, before: RoutingSums | None = None) -> RoutingSums | None:
        """Sum `record`, on top of `before`; None when there are no routers."""
        routers = [] if record is None else [r for r in (record.independent, record.dependent) if r is not None]
        if record is None or not routers:
            return before
        nothing = torch.zeros(routers[0].probabilities.shape[-1], device=routers[0].probabilities.device)
        fields: dict[str, torch.Tensor] = {"clips": nothing.new_tensor([record.clips])}
        for name, router in (("independent", record.independent), ("dependent", record.dependent)):
            if router is None:
                chosen, probability, uncertainty = nothing, nothing, nothing.new_zeros(1)
            else:
                times = record.clips if name == "independent" else 1
                chosen = router.chosen.float().reshape(-1, len(nothing)).sum(0) * times
                probability = router.probabilities.reshape(-1, len(nothing)).sum(0) * times
                uncertainty = entropy(router.probabilities).sum().reshape(1) * times
            fields |= {
                f"{name}_chosen": chosen,
                f"{name}_probability": probability,
                f"{name}_entropy": uncertainty,
            }
        sums = cls(**fields)
        return sums if before is None else before + sums

    def __add__(self, other: RoutingSums) -> RoutingSums:
        """Join the sums over two sets of clips."""
        return RoutingSums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def reduced(self, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> RoutingSums:
        """Sum over ranks in one collective."""
        fields = vars(self)
        flat = all_reduce(torch.cat(list(fields.values())))
        parts = flat.cpu().split([len(value) for value in fields.values()])
        return RoutingSums(**dict(zip(fields, parts, strict=True)))

    def summary(self, members: list[str]) -> dict[str, Any]:
        """Return shares of clips and mean probabilities by member name, and mean entropies in nats."""
        clips = max(1.0, float(self.clips))
        result: dict[str, Any] = {}
        for name in ("dependent", "independent"):
            result[name] = {
                "load": _shares(members, getattr(self, f"{name}_chosen"), clips),
                "probability": _shares(members, getattr(self, f"{name}_probability"), clips),
                "entropy": float(getattr(self, f"{name}_entropy")) / clips,
            }
        return result


def routing_of(answers: Sequence[Answer]) -> dict[str, RoutingSums]:
    """Sum the routing of answered samples by task; samples without a clip, or of a model without routers, do not count.

    The entropy of a clip heard in pieces is that of its mean probabilities.
    """
    heard = [answer for answer in answers if answer.dependent or answer.independent]
    return {task: _sums(found) for task, found in by_task(heard).items()}


def _sums(answers: Sequence[Answer]) -> RoutingSums:
    choices = {
        name: [choice for answer in answers if (choice := getattr(answer, name))]
        for name in ("dependent", "independent")
    }
    members = next(len(choice.load) for made in choices.values() for choice in made)
    fields = {"clips": torch.tensor([len(answers)], dtype=torch.float64)}
    for name, made in choices.items():
        loads = torch.tensor([choice.load for choice in made], dtype=torch.float64).reshape(-1, members)
        probabilities = torch.tensor([choice.probabilities for choice in made], dtype=torch.float64)
        fields |= {
            f"{name}_chosen": loads.sum(0),
            f"{name}_probability": probabilities.reshape(-1, members).sum(0),
            f"{name}_entropy": entropy(probabilities).sum().reshape(1),
        }
    return RoutingSums(**fields)


def _shares(members: list[str], sums: torch.Tensor, clips: float) -> dict[str, float]:
    return {member: float(value) / clips for member, value in zip(members, sums.tolist(), strict=True)}
