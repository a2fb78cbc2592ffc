"""One process, plain torch: what the training loop must not need more than."""

from collections.abc import Callable
from typing import Any

import torch

from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.training.optimizer import set_learning_rates


class PlainEngine:
    """A model and its optimizer, without sharding or mixed precision.

    Attributes:
        gradients: Of the last step, before clipping, by parameter name.
        factors: Learning rate factor of every step.
    """

    rank = 0
    world_size = 1
    device = torch.device("cpu")
    sharded = False

    def __init__(
        self,
        model: MoweForConditionalGeneration,
        groups: list[dict[str, Any]],
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        clip_norm: float = float("inf"),
    ):
        self.model = model.train()
        self.optimizer = optimizer(groups)
        self.clip_norm = clip_norm
        self.gradients: dict[str, torch.Tensor] = {}
        self.factors: list[float] = []
        self.ends: list[bool] = []

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        self.ends.append(last)

    def step(self, learning_rate_factor: float) -> float:
        trained = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients = {name: p.grad.clone() for name, p in trained.items()}
        self.factors.append(learning_rate_factor)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), self.clip_norm)
        set_learning_rates(self.optimizer.param_groups, learning_rate_factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value]
