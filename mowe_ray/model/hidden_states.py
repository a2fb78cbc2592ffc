"""Hidden states of an encoder: which of them a choice of features needs, and their learned sum.

last          the output                           layers:[N, M]   a learned sum of some of them
layer:N       one of them, 0 being the input       weighted_sum    a learned sum of all, as in SUPERB
              of the first layer                                   (arXiv 2105.01051)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .encoder_base import AudioEncoder

_KEYS = "model.weak_encoders, model.base_encoder_features"


def layers_of(choice: str, num_layers: int) -> list[int]:
    """Return the numbers of the hidden states, 0 to `num_layers`, that a choice needs; L of them.

    Raises:
        ValueError: `choice` is no such text, or names a layer that the encoder does not have.
    """
    if choice == "last":
        return [num_layers]
    if choice == "weighted_sum":
        return list(range(num_layers + 1))
    if not re.fullmatch(r"layer:\d+|layers:\[\d+(, ?\d+)*\]", choice):
        raise ValueError(f"{_KEYS}: features must be last, layer:N, layers:[N, M] or weighted_sum, not {choice!r}")
    numbers = [int(number) for number in re.findall(r"\d+", choice)]
    if max(numbers) > num_layers:
        raise ValueError(f"{_KEYS}: features={choice}, but the encoder has layers 0 to {num_layers}")
    return numbers


def is_sum(choice: str) -> bool:
    """Whether a choice has learned weights."""
    return choice == "weighted_sum" or choice.startswith("layers:")


def chosen_layers(encoder: AudioEncoder, choice: str, features: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """Run an encoder, and return the L hidden states (R, N, E) that a choice of features needs.

    Args:
        encoder: What to run.
        choice: See the module.
        features: (R, ...) from its front-end.
        lengths: (R,) valid samples; None if nothing is padded.

    Raises:
        ValueError: As `layers_of`.
    """
    numbers = layers_of(choice, encoder.num_layers)
    if choice == "last":
        return [encoder(features, lengths=lengths)]
    layers = encoder(features, all_layers=True, lengths=lengths)
    return [layers[number] for number in numbers]


def learned_sum(layers: Sequence[Tensor], logits: Tensor | None) -> Tensor:
    """Return the sum of layers (R, N, E) by the softmax of their logits (L,); None: there is one."""
    if logits is None:
        (only,) = layers
        return only
    weights = logits.float().softmax(0).to(layers[0].dtype)
    total = layers[0] * weights[0]
    for weight, layer in zip(weights[1:], layers[1:], strict=True):
        total = total + weight * layer
    return total


class LayerSum(nn.Module):
    """What a choice of features makes of the hidden states it needs; without parameters where it needs one.

    Args:
        choice: See the module.
        num_layers: Of the encoder.
    """

    def __init__(self, choice: str, num_layers: int):
        super().__init__()
        self.choice = choice
        needed = len(layers_of(choice, num_layers))
        self.logits = nn.Parameter(torch.zeros(needed)) if is_sum(choice) else None

    def reset_parameters(self) -> None:
        """Weight all layers alike."""
        if self.logits is not None:
            nn.init.zeros_(self.logits)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Return (R, N, E) of L tensors (R, N, E)."""
        return learned_sum(layers, self.logits)
