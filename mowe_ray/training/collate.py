"""A collated micro-batch: what the model takes, and what the loop needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.micro_batch import Features, MicroBatch
from mowe_ray.data.sample import BadSample
from mowe_ray.model import MoweProcessor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of R rows with C clips, ready for the device.

    Attributes:
        inputs: Keyword arguments of the model's forward: `input_ids` (R, N), `attention_mask` (R, N),
            `labels` (R, N) and, when there is audio, `input_values` (C, S) and `input_lengths` (C,).
        answer_tokens: Labelled tokens.
        audio_s: Seconds of real audio; `padded_s` counts the padding up to the longest clip too.
        ids, sources, tasks, answers: One string a row; has_audio tells which rows have a clip.
        bad: Samples of this micro-batch that could not be used.
        encoder_states: The argument of that name, of the encoders that need not run.
    """

    inputs: dict[str, torch.Tensor]
    answer_tokens: int
    clips: int
    audio_s: float
    padded_s: float
    ids: list[str]
    sources: list[str]
    tasks: list[str]
    answers: list[str]
    has_audio: list[bool]
    bad: list[BadSample]
    encoder_states: dict[int, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> dict[str, Any]:
        """Return all that the model's forward takes, on `device`."""
        return self.text_to(device) | self.audio_to(device)

    def text_to(self, device: torch.device | str) -> dict[str, Any]:
        """Return what forward takes beside the audio, on `device`."""
        return {name: _moved(tensor, device) for name, tensor in self.inputs.items() if name not in _AUDIO}

    def audio_to(self, device: torch.device | str) -> dict[str, Any]:
        """Return the arguments of the model's `prepare_audio`, on `device`."""
        audio: dict[str, Any] = {name: _moved(tensor, device) for name, tensor in self.inputs.items() if name in _AUDIO}
        if self.encoder_states:
            audio["encoder_states"] = {place: _moved(known, device) for place, known in self.encoder_states.items()}
        return audio


_AUDIO = ("input_values", "input_lengths")


def _moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)


def collate(micro_batch: MicroBatch, processor: MoweProcessor, *, generate: bool = False) -> Batch:
    """Turn decoded samples into model inputs.

    A micro-batch that lost all its samples becomes one text-only row without labels: the rank
    then still takes part in every collective of the step, with no weight in the loss.

    Args:
        generate: Build prompts without answers, padded on the left, instead of training rows.
    """
    instructions, answers = micro_batch.instructions, micro_batch.answers
    audio = [[] if clip is None else [clip] for clip in micro_batch.waveforms()]
    empty = not instructions
    features: Mapping[str, Any] = processor(
        instructions=["-"] if empty else instructions,
        audio=[[]] if empty else audio,
        answers=None if generate else (["-"] if empty else answers),
    )
    inputs = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    if empty and "labels" in inputs:
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    lengths = [length for length in micro_batch.lengths if length]
    return Batch(
        inputs=inputs,
        # The first position has no prediction, so a label there would not count.
        answer_tokens=int((inputs["labels"][:, 1:] != -100).sum()) if "labels" in inputs else 0,
        clips=len(lengths),
        audio_s=sum(lengths) / SAMPLE_RATE,
        padded_s=len(lengths) * max(lengths, default=0) / SAMPLE_RATE,
        ids=micro_batch.ids,
        sources=micro_batch.sources,
        tasks=micro_batch.tasks,
        answers=answers,
        has_audio=[length > 0 for length in micro_batch.lengths],
        bad=micro_batch.bad,
        encoder_states={features.place: padded(features) for features in micro_batch.features},
    )


def padded(features: Features) -> torch.Tensor:
    """Return an encoder's features as one bfloat16 tensor (C, L, T, E), with zeros behind each clip's own frames."""
    layers, width = features.layers, features.width
    shape = (len(features.frames), layers, max(features.frames, default=1), width)
    states, start = np.zeros(shape, np.uint16), 0
    for clip, frames in zip(states, features.frames, strict=True):
        end = start + layers * frames * width
        clip[:, :frames] = features.values[start:end].reshape(layers, frames, width)
        start = end
    return torch.from_numpy(states).view(torch.bfloat16)
