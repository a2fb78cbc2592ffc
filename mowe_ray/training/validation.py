"""Validation: loss, answers and routing on held-out samples, shared out over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import BadAudio
from mowe_ray.evaluation.generation import generate_texts
from mowe_ray.evaluation.predictions import Answer, by_task
from mowe_ray.evaluation.routing import RoutingSums
from mowe_ray.evaluation.scoring import majority_score, score
from mowe_ray.model import AudioTokens, MoweOutput, MoweProcessor
from mowe_ray.training.collate import Batch, collate
from mowe_ray.training.protocols import EvaluationEngine

# Room for an answer to be wrong by being longer than the longest reference of its batch.
_EXTRA_TOKENS = 8
_KEPT_WAVES = 8  # clips to listen to in a tracker


@dataclass(frozen=True)
class ValidationResult:
    """Result of one pass over one validation source, equal on all ranks.

    Attributes:
        loss: Next-token loss per answer token.
        tasks: `score`, `majority` and `samples` by task; higher is better in both scores.
        answers: All answers, in order of id.
        routing: Summed decisions by task; empty without routers.
        bad: Samples that could not be used.
        waves: A few clips of this rank, by the id of the answer: 16 kHz, -1 to 1.
    """

    loss: float
    tasks: dict[str, dict[str, float]]
    answers: list[Answer]
    routing: dict[str, RoutingSums]
    bad: list[Any]
    waves: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """The score of each task, rounded for people."""
        return {task: round(values["score"], 4) for task, values in self.tasks.items()}


def scores_of_tasks(results: Mapping[str, ValidationResult]) -> dict[str, dict[str, float]]:
    """Return score and majority of each task, over all samples of all sources: the tasks of one more source join in."""
    found: dict[str, list[dict[str, float]]] = {}
    for result in results.values():
        for task, values in result.tasks.items():
            found.setdefault(task, []).append(values)
    return {task: {key: round(_mean(key, rows), 4) for key in ("score", "majority")} for task, rows in found.items()}


def _mean(key: str, rows: Iterable[Mapping[str, float]]) -> float:
    rows = list(rows)
    return math.fsum(row[key] * row["samples"] for row in rows) / math.fsum(row["samples"] for row in rows)


@torch.no_grad()
def validate(
    engine: EvaluationEngine,
    processor: MoweProcessor,
    micro_batches: Iterable[MicroBatch],
    max_text_tokens: int | None = None,
) -> ValidationResult:
    """Answer this rank's micro-batches and join them with those of the other ranks. Collective.

    Args:
        micro_batches: Equally many on every rank; they may be empty.
        max_text_tokens: Longest row without its audio; None for any.
    """
    model = engine.model
    was_training = model.training
    model.train(False)
    answers: list[Answer] = []
    routing: dict[str, RoutingSums] = {}
    bad: list[Any] = []
    loss_sum, tokens = 0.0, 0
    waves: dict[str, npt.NDArray[np.float32]] = {}
    for micro_batch in micro_batches:
        batch = collate(micro_batch, processor, max_text_tokens=max_text_tokens).on(engine.device)
        kept = _kept(micro_batch, batch)
        audio = model.encode_audio(**batch.model_inputs)  # once, for the loss and for the answers
        # Divided by 1: sums over micro-batches and ranks, divided by all tokens in the end, weight every token alike.
        output = engine.forward(**batch.text_inputs, audio=audio, num_items_in_batch=1, answers_only=True)
        assert output.lm_loss is not None  # there were labels
        loss_sum, tokens = loss_sum + float(output.lm_loss), tokens + batch.answer_tokens
        _add_routing(routing, output, batch)
        answers += _answer(engine, processor, kept, batch, audio)
        bad += batch.bad
        _keep_waves(waves, kept)
    model.train(was_training)
    return replace(_join(engine.gather((loss_sum, tokens, answers, routing, bad))), waves=waves)


def _keep_waves(waves: dict[str, npt.NDArray[np.float32]], micro_batch: MicroBatch) -> None:
    """Keep the first clips of the source: the same ones in every validation."""
    if len(waves) < _KEPT_WAVES:
        first_clips = {
            name: clips[0] for name, clips in zip(micro_batch.ids, micro_batch.clips(), strict=True) if clips
        }
        waves |= dict(list(first_clips.items())[: _KEPT_WAVES - len(waves)])


def _kept(micro_batch: MicroBatch, batch: Batch) -> MicroBatch:
    """Return the rows of a micro-batch that are in its collated batch."""
    kept = set(batch.ids)
    refused = {row: BadAudio("crashed", "") for row, name in enumerate(micro_batch.ids) if name not in kept}
    return micro_batch.without(refused) if refused else micro_batch


def _answer(
    engine: EvaluationEngine,
    processor: MoweProcessor,
    micro_batch: MicroBatch,
    labelled: Batch,
    audio: AudioTokens | None,
) -> list[Answer]:
    prompts = collate(micro_batch, processor, generate=True).on(engine.device)
    longest = int((labelled.inputs["labels"] != -100).sum(1).max())
    most = longest + _EXTRA_TOKENS
    if processor.max_positions is not None:  # a prompt with its own answer has room, a longer answer may not
        most = max(1, min(most, processor.max_positions - prompts.inputs["input_ids"].shape[1]))
    texts = generate_texts(
        engine.model,
        processor,
        prompts.text_inputs,
        audio,
        max_new_tokens=most,
        synced_gpus=engine.sharded,
    )
    # An empty batch has one dummy row.
    fields = zip(micro_batch.ids, micro_batch.tasks, micro_batch.instructions, texts, strict=False)
    return [Answer(*values, **micro_batch.scored_by(row)) for row, values in enumerate(fields)]


def _add_routing(routing: dict[str, RoutingSums], output: MoweOutput, batch: Batch) -> None:
    if output.routing is None or not batch.clips:
        return
    clip_tasks = [task for task, clips in zip(batch.tasks, batch.row_clips, strict=True) for _ in range(clips)]
    for task in sorted(set(clip_tasks)):
        rows = [i for i, t in enumerate(clip_tasks) if t == task]
        sums = RoutingSums.of(output.routing.select(rows), routing.get(task))
        if sums is not None:
            routing[task] = sums


def _join(ranks: list[tuple[float, int, list[Answer], dict[str, RoutingSums], list[Any]]]) -> ValidationResult:
    answers = sorted((a for r in ranks for a in r[2]), key=lambda a: (a.task, a.id))
    routing: dict[str, RoutingSums] = {}
    for _, _, _, routed, _ in ranks:
        for task, sums in routed.items():
            routing[task] = routing[task] + sums if task in routing else sums
    tasks = {}
    for task, rows in by_task(answers).items():
        tasks[task] = {
            "score": score(task, rows),
            "majority": majority_score(task, rows),
            "samples": len(rows),
        }
    loss_sum, tokens = sum(r[0] for r in ranks), sum(r[1] for r in ranks)
    return ValidationResult(
        loss=loss_sum / tokens if tokens else math.nan,
        tasks=tasks,
        answers=answers,
        routing=routing,
        bad=[b for r in ranks for b in r[4]],
    )
