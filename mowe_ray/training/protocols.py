"""Interfaces between the parts of a run: the engine, the rank context, and the error that ends a run for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # drivers import this too, and need no torch
    import torch

    from mowe_ray.model import MoweForConditionalGeneration, MoweOutput


class RunError(ValueError):
    """An error that only the user can fix; raised on all ranks together, and never retried."""


@dataclass(frozen=True)
class Ranks:
    """Collective operations of the training processes.

    Attributes:
        rank, world_size: Index of this process, and how many there are.
        gather: Returns every rank's value, by rank; no rank goes on before all have called it. Collective.
        all_reduce: Sums a tensor over all ranks. Collective.
        log: Shows a line to the user; lines of ranks other than 0 may be dropped.
    """

    rank: int
    world_size: int
    gather: Callable[[Any], list[Any]]
    all_reduce: Callable[[torch.Tensor], torch.Tensor]
    log: Callable[[str], object]

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the files of the run and logs."""
        return self.rank == 0


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
        """Add the gradient of a micro-batch's part of the global loss; `last` ends the accumulation."""

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
    """An unsharded model in a single process, with the interface that validation uses."""

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
