"""Floating-point operations of the parts of a model, counted on PyTorch's meta device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.configuration_mowe import MoweConfig
from mowe_ray.model.cost import encoder_cost, language_model_cost
from mowe_ray.model.routing import router_inputs

CLIP_S = 30.0


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


def runs_all_members(config: MoweConfig) -> bool:
    """Whether every clip runs every pool member."""
    return not config.routed or config.router_execution == "dense"


def running_members(config: MoweConfig) -> tuple[int, int]:
    """Return how many pool members run for one clip, at least and at most."""
    members = len(config.weak_encoders or [])
    if runs_all_members(config):
        return members, members
    k = min(config.router_top_k, members)
    return k, members if config.routes_frames else min(members, k * config.num_routers)


def parameters_of(model: MoweForConditionalGeneration) -> tuple[Amount, int]:
    """Count the weights of a model, also of one that ZeRO-3 has sharded, and how many of them are trained."""
    members = len(model.config.weak_encoders or [])
    counts, trained = [0.0] * (members + 1), 0
    for name, parameter in model.named_parameters():
        member = re.match(r"audio_tower\.pool\.members\.(\d+)\.", name)
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        counts[int(member[1]) + 1 if member else 0] += size
        trained += size * parameter.requires_grad
    return Amount(counts[0], tuple(counts[1:])), trained


def expected_share(config: MoweConfig) -> float:
    """Return the share of the clips that a pool member runs for while the routers are undecided."""
    members = len(config.weak_encoders or [])
    # Among the hundreds of frames of a clip, some needs each member.
    if not members or runs_all_members(config) or config.routes_frames:
        return float(members > 0)
    # Each router chooses a member with probability k / M, independently; it runs if any of them does.
    return float(1.0 - (1.0 - min(config.router_top_k, members) / members) ** config.num_routers)


def audio_tokens(model: MoweForConditionalGeneration, seconds: float) -> int:
    """Return the tokens of the language model that a clip becomes."""
    return model.audio_tower.token_counts([round(seconds * SAMPLE_RATE)])[0]


def part_gflops(model: MoweForConditionalGeneration, seconds: float, tokens: int) -> dict[str, Amount]:
    """Return the forward pass of each part over one clip and one row of tokens; LoRA counts with the module it is in.

    Args:
        model: On the meta device.
        seconds: Length of the clip.
        tokens: Length of the language model's row.
    """
    tower, config = model.audio_tower, model.config
    pool = list(tower.pool or ())
    none = [0.0] * len(pool)
    samples = round(seconds * SAMPLE_RATE)
    frames = torch.tensor([tower.base_encoder.num_frames(samples)], device="meta")
    features = torch.empty(1, tower.base_encoder.num_frames(samples), tower.base_encoder.width, device="meta")
    work = {"base_encoder": Amount(encoder_cost(tower.base_encoder, seconds).gflops, tuple(none))}
    projections = list(none)
    for i, (spec, member) in enumerate(zip(config.weak_encoders or [], pool, strict=True)):
        # Only this member's entry: a clip that does not choose it does none of its work.
        own = list(none)
        own[i] = encoder_cost(member.encoder, seconds).gflops
        work[f"weak_encoders.{spec.name}"] = Amount(0.0, tuple(own))
        states = torch.empty(1, member.encoder.num_frames(samples), member.encoder.width, device="meta")
        projections[i] = _gflops(member.projection, states)
        if member.fuse is not None:
            projections[i] += _gflops(member.fuse, features, features, frames)
    work["projections"] = Amount(0.0, tuple(projections))
    if tower.dependent_router is not None:
        prompts = torch.empty(1, config.get_text_config().hidden_size, device="meta")
        inputs = router_inputs(config.router_input, features, frames, prompts, per_frame=config.routes_frames)
        work["routers"] = Amount(_gflops(tower.dependent_router, inputs), tuple(none))
    # The count depends on shapes alone.
    fused, joining = features, 0.0
    if tower.fusion is not None:
        mixed = [features[:, : tower.fusion.places(features.shape[1])]] * tower.fusion.num_mixtures
        joining = _gflops(tower.fusion, features, mixed)
        fused, _ = tower.fusion(features, mixed)
    work["adapter"] = Amount(joining + _gflops(tower.adapter, fused, frames), tuple(none))
    work["language_model"] = Amount(language_model_cost(model.language_model, tokens).gflops, tuple(none))
    return work


def _gflops(module: torch.nn.Module, *inputs: Any) -> float:
    # With gradients: the counter cannot follow a trainable tensor's view that has no graph (Q-Former's queries).
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops()) / 1e9
