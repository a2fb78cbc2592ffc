"""How the pool joins the base encoder, by `model.fusion`.

Legend: C clips, T base frames, D base width, M pool members, h base features, s_m the frames of member m projected to
width D and aligned with h, w_rm the weight that router r gives member m (zero unless chosen), N latents, W width of the
language model; K mixtures, R clips of one member, X places of a mixture: T frames, or N latents.

    routed            concat(h, sum_m w_1m s_m, sum_m w_2m s_m)       [paper: concat; axis ours]
    sum               h + sum_r sum_m w_rm s_m
    cross_attention   h + sum_r sum_m w_rm tanh(g_m) Attention_m(query h, key and value s_m), g_m = 0 at first
    latents           h; and each chosen member's N latents Attention_m(query q_m, key and value s_m), weighted by w_rm,
                      are N audio tokens behind those of h
    concat, average   concat(h, s_1 ... s_M), concat(h, mean_m s_m): all members run, without routers

The gate that opens from zero is Flamingo's (arXiv 2204.14198). Dense baselines and all that is not marked are [ours].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import CrossAttention, valid_mask
from .registry import Registry
from .routing import Routing


class Mixture(NamedTuple):
    """A weighted sum over members: weights (C, 1, M) or (C, T, M), and which members each clip needs, (C, M) bool."""

    weights: Tensor
    used: Tensor


@dataclass(frozen=True)
class FusionSizes:
    """What a fusion is built for.

    Attributes:
        width: D.
        members: M.
        routers: Routers that are on; 0 where the fusion takes none.
        top_k: Members that each router keeps.
        latents: N.
        token_width: W.
    """

    width: int
    members: int
    routers: int
    top_k: int
    latents: int
    token_width: int


class Fusion(nn.Module, ABC):
    """Base class: which mixtures of members are made, and what becomes of them.

    The pool runs the members, passes each one's frames through its own network of `new_member` and adds them up with
    the weights of `mixtures`; `forward` joins the sums with the base features.

    Attributes:
        routed: Whether routers choose the members; else all of them run for every clip.
        sizes: What it was built for.
    """

    routed: ClassVar[bool] = True

    def __init__(self, sizes: FusionSizes):
        super().__init__()
        self.sizes = sizes

    @property
    def num_mixtures(self) -> int:
        """K."""
        return 1

    @property
    def out_width(self) -> int:
        """Width of the features that the adapter gets."""
        return self.sizes.width

    @property
    def tokens(self) -> int:
        """Audio tokens that a clip gets besides those of the adapter."""
        return 0

    def places(self, frames: int) -> int:
        """Return X for T frames."""
        return frames

    def new_member(self) -> nn.Module | None:
        """Build the network between a member's frames and the mixtures, one for each member; None for none.

        It is called with the member's frames (R, T, D), the base features (R, T, D) and the valid frames (R,) of the
        same clips, and returns (R, X, D).
        """
        return None

    @abstractmethod
    def mixtures(self, routings: Sequence[Routing], present: Tensor) -> list[Mixture]:
        """Return the K mixtures.

        Args:
            routings: The decisions of the routers that are on.
            present: (C, M) bool, false for members that a clip has to do without.
        """

    @abstractmethod
    def forward(self, features: Tensor, mixed: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Join base features (C, T, D) and K mixtures (C, X, D).

        Returns:
            (C, T, out_width) for the adapter, and audio tokens (C, `tokens`, W), or None.
        """


FUSIONS: Registry[type[Fusion]] = Registry("model.fusion")
"""Class by name."""


@FUSIONS.register("routed")
class Routed(Fusion):
    """Concatenate one mixture per router to the base features [paper]."""

    @property
    def num_mixtures(self) -> int:
        """One for each router."""
        return self.sizes.routers

    @property
    def out_width(self) -> int:
        """Base features and mixtures side by side."""
        return self.sizes.width * (1 + self.num_mixtures)

    def mixtures(self, routings: Sequence[Routing], present: Tensor) -> list[Mixture]:
        """Weight members as each router does."""
        return [_mixture(routing.weights, routing.chosen, len(present)) for routing in routings]

    def forward(self, features: Tensor, mixed: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Concatenate on the feature axis."""
        return torch.cat([features, *mixed], dim=-1), None


@FUSIONS.register("sum")
class Sum(Fusion):
    """Add the weighted members of all routers to the base features: nothing behind them widens."""

    def mixtures(self, routings: Sequence[Routing], present: Tensor) -> list[Mixture]:
        """Add up the routers' weights: a member that two of them chose counts with both."""
        first, *others = (_mixture(routing.weights, routing.chosen, len(present)) for routing in routings)
        for other in others:
            first = Mixture(first.weights + other.weights, first.used | other.used)
        return [first]

    def forward(self, features: Tensor, mixed: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Add."""
        return features + mixed[0], None


@FUSIONS.register("cross_attention")
class CrossAttentionFusion(Sum):
    """Add what the base frames, as queries, find in the frames of each chosen member."""

    def new_member(self) -> nn.Module:
        """Build the member's attention."""
        return GatedAttention(self.sizes.width)


@FUSIONS.register("latents")
class Latents(Fusion):
    """Append N audio tokens for each member that a router chose, the most probable first.

    With a decision for each frame, a member's weight is its mean over the clip's frames.
    """

    def __init__(self, sizes: FusionSizes):
        super().__init__(sizes)
        self.project = nn.Linear(sizes.width, sizes.token_width)

    @property
    def num_mixtures(self) -> int:
        """One for each router and rank, so that the number of tokens does not depend on the choices."""
        return self.sizes.routers * self.sizes.top_k

    @property
    def tokens(self) -> int:
        """N for each router and rank."""
        return self.num_mixtures * self.sizes.latents

    def places(self, frames: int) -> int:
        """Return N."""
        return self.sizes.latents

    def new_member(self) -> nn.Module:
        """Build the member's latents."""
        return LatentAttention(self.sizes.width, self.sizes.latents)

    def mixtures(self, routings: Sequence[Routing], present: Tensor) -> list[Mixture]:
        """Give each rank of each router a mixture of its own; it holds one member, or none."""
        return [
            _mixture(routing.per_clip(routing.weights * rank), routing.per_clip(rank) > 0, len(present))
            for routing in routings
            for rank in _ranks(routing, self.sizes.top_k)
        ]

    def forward(self, features: Tensor, mixed: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Project latents to tokens; the frames stay as they are."""
        tokens: Tensor = self.project(torch.cat(mixed, dim=1))
        return features, tokens


@FUSIONS.register("concat")
class Concat(Fusion):
    """Concatenate all members, a dense baseline."""

    routed = False

    @property
    def num_mixtures(self) -> int:
        """One for each member."""
        return self.sizes.members

    @property
    def out_width(self) -> int:
        """Base features and members side by side."""
        return self.sizes.width * (1 + self.num_mixtures)

    def mixtures(self, routings: Sequence[Routing], present: Tensor) -> list[Mixture]:
        """Give each member a mixture of its own."""
        alone = torch.eye(present.shape[-1], dtype=torch.bool, device=present.device)
        return [_mixture((present & one).float(), present & one, len(present)) for one in alone]

    def forward(self, features: Tensor, mixed: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Concatenate on the feature axis."""
        return torch.cat([features, *mixed], dim=-1), None


@FUSIONS.register("average")
class Average(Fusion):
    """Concatenate the mean of all members, a dense baseline."""

    routed = False

    @property
    def out_width(self) -> int:
        """Base features and mean side by side."""
        return 2 * self.sizes.width

    def mixtures(self, routings: Sequence[Routing], present: Tensor) -> list[Mixture]:
        """Weight all members that are present alike."""
        weights = present.float() / present.sum(-1, keepdim=True).clamp(min=1)
        return [_mixture(weights, present, len(present))]

    def forward(self, features: Tensor, mixed: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Concatenate on the feature axis."""
        return torch.cat([features, *mixed], dim=-1), None


class GatedAttention(CrossAttention):
    """Attention of the base frames to one member's, times a gate that is closed at first."""

    def __init__(self, width: int):
        super().__init__(width)
        self.gate = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the base encoder alone; the other tensors belong to submodules."""
        nn.init.zeros_(self.gate)

    def forward(self, states: Tensor, queries: Tensor, valid: Tensor) -> Tensor:
        """Return (R, T, D) for a member's frames (R, T, D), base features (R, T, D) and their valid frames (R,)."""
        return self.gate.tanh() * self.attend(queries, states, valid_mask(valid, states.shape[1]))


class LatentAttention(CrossAttention):
    """N learned queries, and what they find in one member's frames."""

    def __init__(self, width: int, latents: int):
        super().__init__(width)
        self.latents = nn.Parameter(torch.empty(latents, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries; the other tensors belong to submodules."""
        nn.init.normal_(self.latents, std=0.02)

    def forward(self, states: Tensor, queries: Tensor, valid: Tensor) -> Tensor:
        """Return (R, N, D) for a member's frames (R, T, D) of which `valid` (R,) count."""
        latents = self.latents.expand(len(states), -1, -1)
        return latents + self.attend(latents, states, valid_mask(valid, states.shape[1]))


def _mixture(weights: Tensor, chosen: Tensor, clips: int) -> Mixture:
    """Bring the weights and choices (..., M) of one decision, of one for each clip or for each frame into one form."""
    if weights.dim() == 3:
        return Mixture(weights, chosen.any(1))
    return Mixture(weights.expand(clips, -1)[:, None], chosen.expand(clips, -1))


def _ranks(routing: Routing, k: int) -> list[Tensor]:
    """Mark the most probable of the chosen members, the second and so on: k masks (..., M) of one member or none."""
    probabilities = routing.probabilities.detach().masked_fill(~routing.chosen, -1.0)
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    members = probabilities.shape[-1]
    return [F.one_hot(order[..., rank], members).bool() & routing.chosen for rank in range(k)]
