"""The training loop: optimizer steps over the global batch, as a generator of their results.

Every micro-batch of every rank adds its share to one global loss, normalised by the answer tokens
and the clips of the whole step. So the same step on one worker or on many gives the same gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mowe_ray.model import PreparedAudio, RoutingTotals
from mowe_ray.training.batch import Batch
from mowe_ray.training.routing_sums import RoutingSums
from mowe_ray.training.schedule import Schedule, learning_rate_factor


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


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step, summed over all ranks unless said otherwise.

    Attributes:
        step: Optimizer steps finished so far.
        loss: Global loss; `lm_loss` is its next-token part, `routing_loss` the unweighted L_MoWE.
        grad_norm: Norm of the global gradient before clipping.
        learning_rate_factor: Share of the peak learning rates in this step.
        answer_tokens, clips: Size of the global batch; audio_s its seconds of audio, padded_s with padding.
        data_wait_s, step_s: Seconds this rank waited for data and spent in the whole step.
        routing: What the routers did in the step, over all ranks.
        batches: This rank's own micro-batches.
        skipped: Whether loss or gradient was not finite, so that no weight changed.
    """

    step: int
    loss: float
    lm_loss: float
    routing_loss: float
    grad_norm: float
    learning_rate_factor: float
    answer_tokens: int
    clips: int
    audio_s: float
    padded_s: float
    data_wait_s: float
    step_s: float
    routing: RoutingSums | None
    batches: list[Batch]
    skipped: bool


def training_steps(
    engine: Engine,
    micro_batches: Iterator[list[Batch]],
    *,
    start_step: int,
    total_steps: int,
    warmup_steps: int,
    schedule: Schedule,
    seed: int,
) -> Iterator[StepResult]:
    """Train from `start_step` finished steps to `total_steps`, yielding each step's result.

    Args:
        micro_batches: This rank's micro-batches of each step, equally many on every rank.
        seed: With step and lane it decides dropout and router noise, so a resumed run repeats them.
    """
    for step in range(start_step, total_steps):
        began = time.monotonic()
        batches = next(micro_batches)
        waited = time.monotonic() - began
        sizes = _global_sizes(engine, batches)
        seeds = [lane_seed(seed, step, engine.rank + i * engine.world_size) for i in range(len(batches))]
        prepared, totals = _share_routing(engine, batches, seeds)
        losses = torch.zeros(3, dtype=torch.float64)
        routing = None
        for i, batch in enumerate(batches):
            torch.manual_seed(seeds[i])
            output = engine.forward(
                **batch.to(engine.device),
                num_items_in_batch=sizes.answer_tokens,
                routing_totals=totals,
                prepared_audio=prepared[i],
            )
            # One rank's infinite loss may have finite gradients: NaN reaches every rank, and all of them skip the step.
            finite = torch.isfinite(output.loss.detach())
            engine.backward(output.loss if finite else output.loss * math.nan, last=i == len(batches) - 1)
            parts = (output.loss, output.lm_loss, output.routing_loss)
            losses += torch.tensor([0.0 if part is None else float(part.detach()) for part in parts])
            routing = RoutingSums.of(output.routing, routing)
        factor = learning_rate_factor(step, total_steps, warmup_steps, schedule)
        norm = engine.step(factor)
        loss, lm_loss, routing_loss = engine.all_reduce(losses).tolist()
        yield StepResult(
            step=step + 1,
            loss=loss,
            lm_loss=lm_loss,
            routing_loss=routing_loss,
            grad_norm=norm,
            learning_rate_factor=factor,
            answer_tokens=sizes.answer_tokens,
            clips=sizes.clips,
            audio_s=sizes.audio_s,
            padded_s=sizes.padded_s,
            data_wait_s=waited,
            step_s=time.monotonic() - began,
            routing=None if routing is None else routing.reduced(engine.all_reduce),
            batches=batches,
            skipped=not math.isfinite(norm),
        )


@dataclass(frozen=True)
class _Sizes:
    answer_tokens: int
    clips: int
    audio_s: float
    padded_s: float


def _global_sizes(engine: Engine, batches: list[Batch]) -> _Sizes:
    rows = [[b.answer_tokens, b.clips, b.audio_s, b.padded_s] for b in batches]
    tokens, clips, audio_s, padded_s = engine.all_reduce(torch.tensor(rows, dtype=torch.float64).sum(0)).tolist()
    # A step whose samples were all bad has no answer; its loss is then 0 / 1.
    return _Sizes(max(1, int(tokens)), int(clips), audio_s, padded_s)


def _share_routing(
    engine: Engine, batches: list[Batch], seeds: list[int]
) -> tuple[list[PreparedAudio | None], RoutingTotals | None]:
    """Route every micro-batch before the first backward, for L_MoWE is not a sum over clips.

    One micro-batch on one rank is the global batch itself and needs none of it.
    """
    if engine.world_size * len(batches) == 1:
        return [None], None
    prepared: list[PreparedAudio | None] = []
    vectors = []
    for batch, seed in zip(batches, seeds, strict=True):
        audio = {k: v for k, v in batch.to(engine.device).items() if k in ("input_values", "input_lengths")}
        torch.manual_seed(seed)
        audio_state = engine.forward(**audio, prepare_only=True)
        prepared.append(audio_state)
        vectors.append(audio_state.totals.to_vector())
    return prepared, RoutingTotals.from_vector(engine.all_reduce(torch.stack(vectors).sum(0)))


def lane_seed(seed: int, step: int, lane: int) -> int:
    """Return the seed of dropout and noise of one micro-batch, whichever rank computes it."""
    return int(np.random.SeedSequence((seed, step, lane)).generate_state(1)[0])
