"""The training loop: optimizer steps over the global batch, as a generator of their results.

Every micro-batch of every rank adds its share to one global loss, normalised by the answer tokens
and the clips of the whole step. So the same step on one worker or on many gives the same gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from mowe_ray.evaluation.routing import RoutingSums
from mowe_ray.model import PreparedAudio, RoutingTotals
from mowe_ray.training.collate import Batch
from mowe_ray.training.fault_tolerance.out_of_memory import annotate_out_of_memory
from mowe_ray.training.protocols import Engine


@dataclass(frozen=True)
class StepResult:
    """One finished optimizer step, summed over all ranks unless said otherwise.

    Attributes:
        step: Optimizer steps finished so far.
        loss: Global loss; `lm_loss` is its next-token part, `routing_loss` the unweighted L_MoWE.
        grad_norm: Norm of the global gradient before clipping.
        skipped: Whether that norm is not finite, so that the engine left the weights as they were.
        learning_rate_factor: Share of the peak learning rates in this step.
        answer_tokens, clips: Size of the global batch; audio_s its seconds of audio, padded_s with padding.
        data_wait_s, step_s: Seconds this rank waited for data and spent in the whole step.
        routing: Routing sums of the step, over all ranks.
        batches: This rank's own micro-batches.
        routing_losses: The parts of L_MoWE by name, without their weights.
    """

    step: int
    loss: float
    lm_loss: float
    routing_loss: float
    grad_norm: float
    skipped: bool
    learning_rate_factor: float
    answer_tokens: int
    clips: int
    audio_s: float
    padded_s: float
    data_wait_s: float
    step_s: float
    routing: RoutingSums | None
    batches: list[Batch]
    routing_losses: dict[str, float] = field(default_factory=dict)


def training_steps(
    engine: Engine, steps: Iterable[tuple[int, float, list[Batch]]], *, seed: int, dropped_pool: int = 0
) -> Iterator[StepResult]:
    """Train on `steps`, yielding each one's result; every rank passes the same steps with its own micro-batches.

    Args:
        steps: The optimizer steps finished once the step is trained, the factor on its learning rates, and this
            rank's micro-batches, equally many on every rank.
        seed: With step and slot it decides dropout and router noise, so a resumed run repeats them.
        dropped_pool: Members of the pool, to train each clip with a random subset of them; 0 always has all.
    """
    began = time.monotonic()
    for step, factor, batches in steps:
        waited = time.monotonic() - began
        slots = [engine.rank + i * engine.world_size for i in range(len(batches))]
        sizes = _global_sizes(engine, batches, slots)
        presences = _presences(seed, step, dropped_pool, sizes.clips_of_slots, slots)
        losses, parts, routing = _accumulate(engine, batches, step, slots, seed, sizes.answer_tokens, presences)
        loss, lm_loss, routing_loss, *routing_losses = engine.all_reduce(losses).tolist()
        norm = engine.step(factor)
        yield StepResult(
            step=step,
            loss=loss,
            lm_loss=lm_loss,
            routing_loss=routing_loss,
            routing_losses=dict(zip(parts, routing_losses, strict=True)),
            grad_norm=norm,
            skipped=not math.isfinite(norm),
            learning_rate_factor=factor,
            answer_tokens=sizes.answer_tokens,
            clips=sizes.clips,
            audio_s=sizes.audio_s,
            padded_s=sizes.padded_s,
            data_wait_s=waited,
            step_s=time.monotonic() - began,
            routing=None if routing is None else routing.reduced(engine.all_reduce),
            batches=batches,
        )
        began = time.monotonic()


def _accumulate(
    engine: Engine,
    batches: list[Batch],
    step: int,
    slots: list[int],
    seed: int,
    answer_tokens: int,
    presences: list[dict[str, torch.Tensor]],
) -> tuple[torch.Tensor, list[str], RoutingSums | None]:
    """Run forward and backward of every micro-batch.

    Returns:
        This rank's part of the three losses and of the parts of the routing loss, the names of these, and its routing.

    Raises:
        MicroBatchOutOfMemory: Names the micro-batch that does not fit.
    """
    seeds = [micro_batch_seed(seed, step - 1, slot) for slot in slots]
    batches = [batch.on(engine.device) for batch in batches]
    prepared, totals = _share_routing(engine, batches, step, slots, seeds, presences)
    # float64: sums of many small shares; on the device, so that the host need not wait for each.
    losses = zero = torch.zeros((), dtype=torch.float64, device=engine.device)
    parts: list[str] = []
    routing = None
    for i, batch in enumerate(batches):
        # The seed of `_share_routing`'s pass: dropout of the base encoder and router noise are the same in both.
        torch.manual_seed(seeds[i])
        with annotate_out_of_memory(step, slots[i], batch):
            output = engine.forward(
                # Audio that is prepared is on the device already.
                **(batch.model_inputs | presences[i] if prepared[i] is None else batch.text_inputs),
                num_items_in_batch=answer_tokens,
                routing_totals=totals,
                prepared_audio=prepared[i],
            )
            engine.backward(_poisoned_unless_finite(output.loss), last=i == len(batches) - 1)
        shares = {"loss": output.loss, "lm_loss": output.lm_loss, "routing_loss": output.routing_loss}
        shares |= output.routing_losses or {}
        losses = losses + torch.stack([zero if share is None else share.detach().to(zero) for share in shares.values()])
        parts = list(shares)[3:]
        routing = RoutingSums.of(output.routing, routing)
    return losses, parts, routing


def _poisoned_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """Return `loss` with a gradient that is NaN wherever it reaches, if it is not finite itself.

    A loss of inf may have a finite gradient, which would be applied although it is meaningless.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


@dataclass(frozen=True)
class _Sizes:
    answer_tokens: int
    clips: int
    audio_s: float
    padded_s: float
    clips_of_slots: list[int]


def _global_sizes(engine: Engine, batches: list[Batch], slots: list[int]) -> _Sizes:
    rows = [[b.answer_tokens, b.audio_s, b.padded_s] for b in batches]
    # Each slot's clips have a place of their own, so that one sum tells all ranks of all slots.
    clips = torch.zeros(engine.world_size * len(batches), dtype=torch.float64)
    clips[slots] = torch.tensor([float(batch.clips) for batch in batches], dtype=torch.float64)
    summed = engine.all_reduce(torch.cat([torch.tensor(rows, dtype=torch.float64).sum(0), clips])).tolist()
    tokens, audio_s, padded_s, *counts = summed
    # A step whose samples were all bad has no answer; its loss is then 0 / 1.
    return _Sizes(max(1, int(tokens)), int(sum(counts)), audio_s, padded_s, [int(count) for count in counts])


def _share_routing(
    engine: Engine,
    batches: list[Batch],
    step: int,
    slots: list[int],
    seeds: list[int],
    presences: list[dict[str, torch.Tensor]],
) -> tuple[list[PreparedAudio | None], RoutingTotals | None]:
    """Route every micro-batch before the first backward, because L_MoWE is not a sum over clips.

    One micro-batch on one rank is the global batch itself and needs none of it.
    """
    if engine.world_size * len(batches) == 1:
        return [None], None
    prepared: list[PreparedAudio | None] = []
    vectors = []
    for batch, slot, seed, presence in zip(batches, slots, seeds, presences, strict=True):
        torch.manual_seed(seed)
        with annotate_out_of_memory(step, slot, batch):
            audio_state = engine.forward(**batch.model_inputs, **presence, prepare_only=True)
        prepared.append(audio_state)
        vectors.append(audio_state.totals.to_vector())
    return prepared, RoutingTotals.from_vector(engine.all_reduce(torch.stack(vectors).sum(0)))


def _presences(
    seed: int, step: int, members: int, clips_of_slots: list[int], slots: list[int]
) -> list[dict[str, torch.Tensor]]:
    """Return the model's argument `present` for the micro-batches of `slots`; none without members to drop."""
    if not members:
        return [{} for _ in slots]
    subsets = pool_subsets(np.random.default_rng((seed, step, members)), sum(clips_of_slots), members)
    ends = np.cumsum(clips_of_slots)
    return [{"present": torch.from_numpy(subsets[ends[slot] - clips_of_slots[slot] : ends[slot]])} for slot in slots]


def pool_subsets(random: np.random.Generator, clips: int, members: int) -> npt.NDArray[np.bool_]:
    """Draw which of M members each of C clips of a step may use: (C, M).

    All sizes from 0 to M are equally likely, and all subsets of a size. Of two clips or more, one has the whole pool
    and one has none of it: both ends are trained in every step, as in the sandwich rule of slimmable networks
    (arXiv 1903.05134).
    """
    sizes = random.integers(0, members + 1, clips)
    if clips > 1:
        sizes[random.permutation(clips)[:2]] = members, 0
    order = random.random((clips, members)).argsort(1).argsort(1)
    return np.asarray(order < sizes[:, None])


def micro_batch_seed(seed: int, step: int, slot: int) -> int:
    """Return the seed of dropout and noise of one micro-batch, whichever rank computes it."""
    return int(np.random.SeedSequence((seed, step, slot)).generate_state(1)[0])
