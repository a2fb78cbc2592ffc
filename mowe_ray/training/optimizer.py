"""Learning rates: warm-up and decay over the run, and one rate per part of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, warmup_steps: int, decay: float, schedule: Schedule) -> float:
    """Return the factor on every peak learning rate for the update that ends step `step` (counted from 0).

    Linear warm-up from 1/warmup_steps to 1, then `schedule` down to 0
    (cosine: SGDR, arXiv 1608.03983, eq. 5 without restarts).

    Args:
        decay: Share of the run after warm-up that is done before the step. Counted in samples it makes the decay
            independent of how they are batched.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    decay = min(1.0, decay)
    return 1.0 - decay if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * decay))


_UNDECAYED = re.compile(
    r"(bias|[._]token|weight\.original0|A_log|gru_rel_pos_const)$"
    r"|(^|\.)(embed_positions|position_embeddings?|positions|wpe|rel_attn_embed)(\.|$)"
)
"""Names of what has two dimensions or more and is no matrix: biases of experts, class tokens, gains of weight
normalisation, decay rates of state spaces, constants and tables of positions."""


# AdamW moves each parameter by about the learning rate: at rates of weights, of which a sum over hundreds moves an
# output, numbers that are an output themselves stay where they began.
_SCALARS = re.compile(
    r"audio_tower\.(independent_router\.logits|base_layers\.logits|pool\.members\.\d+\.(layer_weights|fuse\.gate))"
)


def scalar_parameters(model: nn.Module) -> list[str]:
    """Name the parameters that are single numbers: logits of the data-independent router, layer weights and gates."""
    return [name for name, _ in model.named_parameters() if _SCALARS.fullmatch(name)]


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay applies to a parameter: to matrices and kernels.

    Biases, norms, gains, class tokens, position tables, the independent router's logits and layer weights are left
    alone: pulled to zero they would change the function, not its smoothness.
    """
    return dimensions >= 2 and _UNDECAYED.search(name) is None


def parameter_groups(
    model: nn.Module,
    part_of: Mapping[str, str],
    learning_rate: float,
    lr_per_part: Mapping[str, float | None],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Return AdamW groups of the trainable parameters, by part and by whether they decay.

    Only matrices and kernels decay, as is usual since GPT-3 (arXiv 2005.14165, appendix B): see `decays`.

    Args:
        part_of: Part of every trainable parameter name, as `parameter_parts` of the model gives it.
        lr_per_part: Peak learning rate of a part; parts not named, or None, use `learning_rate`.

    Returns:
        Groups with `params`, `lr`, `peak_lr`, `weight_decay` and `part`, in a fixed order.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # A parameter that was loaded as a shard (ZeRO-3) is empty, and keeps its shape here.
        part, decayed = part_of[name], decays(name, len(getattr(parameter, "ds_shape", parameter.shape)))
        peak = lr_per_part.get(part)
        peak = learning_rate if peak is None else peak
        group = groups.setdefault(
            (part, decayed),
            {"params": [], "lr": peak, "peak_lr": peak, "weight_decay": weight_decay if decayed else 0.0, "part": part},
        )
        group["params"].append(parameter)
    return list(groups.values())


def set_learning_rates(groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Scale every group's `lr` to `factor` times its own `peak_lr`."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
