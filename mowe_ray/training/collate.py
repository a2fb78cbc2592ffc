"""Collation: decoded samples become the tensors of a micro-batch, and the numbers that the loop logs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.micro_batch import Features, MicroBatch
from mowe_ray.data.sample import BadSample
from mowe_ray.evaluation.positions import drop_too_long
from mowe_ray.model import MoweProcessor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of R rows with C clips, ready for the device.

    Attributes:
        inputs: Keyword arguments of the model's forward: `input_ids` (R, N) with `labels` (R, N), or in prompts with
            `attention_mask` (R, N); and, when there is audio, `input_values` (C, S) and `input_lengths` (C,).
        answer_tokens: Labelled tokens.
        audio_s: Seconds of real audio; `padded_s` counts the padding up to the longest clip too.
        ids, sources, tasks, answers: One string a row; row_clips: how many clips each row has.
        bad: Samples of this micro-batch that could not be used.
        clip_s: Length in seconds of each clip; row_tokens: tokens of each row, without padding.
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
    row_clips: list[int]
    bad: list[BadSample]
    encoder_states: dict[int, torch.Tensor] = field(default_factory=dict)
    clip_s: list[float] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    buffer: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8), repr=False)

    def on(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`: one copy of `buffer`, which does not wait if it is pinned.

        `input_lengths` stay on the host, where shapes are worked out of them.
        """
        if torch.device(device).type == "cpu":
            return self
        moved = unpack(self.buffer.to(device, non_blocking=True), _packed_tensors(self.inputs, self.encoder_states))
        return replace(
            self,
            inputs=self.inputs | {name: tensor for name, tensor in moved.items() if isinstance(name, str)},
            encoder_states={index: known for index, known in moved.items() if isinstance(index, int)},
        )

    @property
    def model_inputs(self) -> dict[str, Any]:
        """All arguments of the model's forward."""
        return self.text_inputs | self.audio_inputs

    @property
    def text_inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward other than audio."""
        return {name: tensor for name, tensor in self.inputs.items() if name not in _AUDIO}

    @property
    def audio_inputs(self) -> dict[str, Any]:
        """The arguments of the model's `prepare_audio`."""
        audio: dict[str, Any] = {name: tensor for name, tensor in self.inputs.items() if name in _AUDIO}
        return audio | ({"encoder_states": self.encoder_states} if self.encoder_states else {})


_AUDIO = ("input_values", "input_lengths")
_ALIGNMENT = 16  # bytes, of every tensor in a buffer: a multiple of all element sizes


def pack(tensors: Mapping[Any, torch.Tensor], *, pin: bool) -> torch.Tensor:
    """Copy tensors into one buffer of bytes, page-locked if `pin`, from which `unpack` takes them."""
    size = sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values())
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for name, view in unpack(buffer, tensors).items():
        view.copy_(tensors[name])
    return buffer


def unpack(buffer: torch.Tensor, tensors: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """Return views into `buffer`, in order, of the types and shapes of `tensors`."""
    views, start = {}, 0
    for name, tensor in tensors.items():
        views[name] = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return views


def _packed_tensors(
    inputs: Mapping[str, torch.Tensor], encoder_states: Mapping[int, torch.Tensor]
) -> dict[Any, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "input_lengths"} | dict(encoder_states)


def collate(
    micro_batch: MicroBatch, processor: MoweProcessor, *, generate: bool = False, max_text_tokens: int | None = None
) -> Batch:
    """Turn decoded samples into model inputs; rows that are too long or that the processor refuses are counted as bad.

    A micro-batch that lost all its samples becomes one text-only row without labels: the rank
    then still takes part in every collective of the step, with no weight in the loss.

    Args:
        generate: Build prompts without answers, padded on the left, instead of training rows.
        max_text_tokens: Longest row without its audio; None for any.
    """
    micro_batch = drop_too_long(micro_batch, processor, max_text_tokens=max_text_tokens)
    try:
        return _collated(micro_batch, processor, generate)
    except Exception:  # whatever a processor raises: the rows that it refuses are found one by one, the rest is kept
        usable = collatable(micro_batch, processor, generate=generate)
        if len(usable.ids) == len(micro_batch.ids):
            raise
        return _collated(usable, processor, generate)


def collatable(micro_batch: MicroBatch, processor: MoweProcessor, *, generate: bool = False) -> MicroBatch:
    """Return the micro-batch without the rows that the processor refuses, which are in its `bad`."""
    return micro_batch.usable_by(lambda alone: _collated(alone, processor, generate))


def _collated(micro_batch: MicroBatch, processor: MoweProcessor, generate: bool) -> Batch:
    instructions, answers = micro_batch.instructions, micro_batch.answers
    audio = micro_batch.clips()
    empty = not instructions
    features: Mapping[str, Any] = processor(
        instructions=["-"] if empty else instructions,
        audio=[[]] if empty else audio,
        answers=None if generate else (["-"] if empty else answers),
        histories=micro_batch.histories or None,
    )
    inputs = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    row_tokens = [] if empty else features["attention_mask"].sum(1).tolist()
    if not generate:
        # Rows to train on are padded on the right, where causal attention never looks: without a mask, it runs in
        # the fused kernels that take none, and no host synchronisation checks whether the mask hides anything.
        del inputs["attention_mask"]
    if empty and "labels" in inputs:
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    states = {features.encoder_index: padded(features) for features in micro_batch.features}
    packed = _packed_tensors(inputs, states)
    buffer = pack(packed, pin=torch.cuda.is_available())
    # Of clips alone: text-only rows have length 0.
    lengths = [length for length in micro_batch.lengths if length]
    views = unpack(buffer, packed)
    return Batch(
        inputs=inputs | {name: view for name, view in views.items() if name in inputs},
        buffer=buffer,
        # The first position has no prediction, so a label there would not count.
        answer_tokens=int((inputs["labels"][:, 1:] != -100).sum()) if "labels" in inputs else 0,
        clips=len(lengths),
        audio_s=sum(lengths) / SAMPLE_RATE,
        padded_s=len(lengths) * max(lengths, default=0) / SAMPLE_RATE,
        ids=micro_batch.ids,
        sources=micro_batch.sources,
        tasks=micro_batch.tasks,
        answers=answers,
        row_clips=[len(lengths) for lengths in micro_batch.row_lengths],
        bad=micro_batch.bad,
        encoder_states={index: views[index] for index in states},
        clip_s=[length / SAMPLE_RATE for length in lengths],
        row_tokens=row_tokens,
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
