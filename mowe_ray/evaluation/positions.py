"""Samples that have no room in the language model's positions: found before the model runs, and counted as bad."""

from __future__ import annotations

from collections.abc import Sequence

from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import BadAudio, bad_audio
from mowe_ray.model import MoweProcessor


def drop_too_long(
    micro_batch: MicroBatch,
    processor: MoweProcessor,
    *,
    instructions: Sequence[str] | None = None,
    new_tokens: int | None = None,
    max_samples: int | None = None,
) -> MicroBatch:
    """Return a micro-batch without the rows that are longer than the language model takes.

    Args:
        processor: Knows the tokens of a row, and how many positions there are.
        instructions: What is asked, by row; None asks the samples' own instructions.
        new_tokens: Room for an answer that is to be generated; None counts the samples' own answers.
        max_samples: Longer clips are answered in pieces of so many samples; None for whole clips.
    """
    bad = {}
    asked = micro_batch.instructions if instructions is None else instructions
    for row, (instruction, length) in enumerate(zip(asked, micro_batch.lengths, strict=True)):
        lengths = [min(length, max_samples or length)] if length else []
        answer = micro_batch.answers[row] if new_tokens is None else None
        try:
            fits = processor.fits(instruction, lengths, answer, new_tokens or 0)
        except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
            bad[row] = bad_audio(error)
            continue
        if not fits:
            tokens = processor.num_tokens(instruction, lengths, answer) + (new_tokens or 0)
            detail = f"{tokens} tokens with its audio, but the language model takes {processor.max_positions}"
            bad[row] = BadAudio("too_many_tokens", detail)
    return micro_batch.without(bad) if bad else micro_batch
