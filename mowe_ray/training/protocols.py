"""What the parts of a run need of one another: the engine, the ranks, and the error that ends a run for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # drivers import this too, and need no torch
    import torch

    from mowe_ray.model import MoweForConditionalGeneration, MoweOutput

from typing import Any, Protocol


class RunError(ValueError):
    """Something only the user can mend; raised on all ranks together, and never retried."""


class Ranks(Protocol):
    """The processes of a run, seen from one of them."""

    @property
    def rank(self) -> int:
        """Index of this rank."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank. Collective."""


class Engine(Protocol):
    """What the loop needs of a (possibly sharded) model and its optimizer."""

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""

    @property
    def rank(self) -> int:
        """Index of this rank."""

    @property
    def world_size(self) -> int:
        """Ranks that average their gradients."""

    def forward(self, **inputs: Any) -> Any:
        """Run the model's forward."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of a micro-batch's share of the global loss; `last` ends the accumulation."""

    def step(self, learning_rate_factor: float) -> float:
        """Clip, update, clear the gradients; returns the global gradient norm before clipping.

        A norm that is not finite changes nothing but the gradients, which are cleared.
        """

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all ranks."""


class EvaluationEngine(Protocol):
    """What validation needs of a (possibly sharded) model."""

    @property
    def model(self) -> MoweForConditionalGeneration:
        """The model, for its mode and for `generate`."""

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""

    @property
    def sharded(self) -> bool:
        """Whether all ranks must generate in lockstep."""

    def forward(self, **inputs: Any) -> MoweOutput:
        """Run the model."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value."""


class OneProcess:
    """A whole model in this process alone, as validation sees it."""

    sharded = False

    def __init__(self, model: MoweForConditionalGeneration):
        """Take `model` on its device."""
        self.model, self.device = model, model.device

    def forward(self, **inputs: Any) -> MoweOutput:
        """Run the model."""
        output: MoweOutput = self.model(**inputs)
        return output

    def gather(self, value: Any) -> list[Any]:
        """Return the only rank's value."""
        return [value]
