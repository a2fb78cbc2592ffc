"""Samples whose text is too long, alone or together with their audio: found before the model runs, counted as bad."""

from __future__ import annotations

from collections.abc import Sequence

from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import BadAudio, Turn, bad_audio
from mowe_ray.model import MoweProcessor


def drop_too_long(
    micro_batch: MicroBatch,
    processor: MoweProcessor,
    *,
    max_text_tokens: int | None = None,
    instructions: Sequence[str] | None = None,
    new_tokens: int | None = None,
    max_samples: int | None = None,
) -> MicroBatch:
    """Return a micro-batch without the rows that are longer than the language model takes, or than allowed.

    Args:
        processor: Knows the tokens of a row, and how many positions there are.
        max_text_tokens: Longest row without its audio; None for any.
        instructions: What is asked, by row; None asks the samples' own instructions.
        new_tokens: Room for an answer that is to be generated; None counts the samples' own answers.
        max_samples: Longer clips are answered in pieces of so many samples; None for whole clips.
    """
    bad = {}
    asked = micro_batch.instructions if instructions is None else instructions
    rows = zip(asked, micro_batch.row_lengths, micro_batch.turns_before, strict=True)
    for row, (instruction, lengths, history) in enumerate(rows):
        cut = [min(length, max_samples or length) for length in lengths]
        answer = micro_batch.answers[row] if new_tokens is None else None
        try:
            _check_length(processor, instruction, cut, answer, new_tokens or 0, max_text_tokens, history)
        except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
            bad[row] = bad_audio(error)
    return micro_batch.without(bad) if bad else micro_batch


def _check_length(
    processor: MoweProcessor,
    instruction: str,
    lengths: list[int],
    answer: str | None,
    new_tokens: int,
    max_text_tokens: int | None,
    history: Sequence[Turn],
) -> None:
    # Text first: a text without end is never tokenized together with its audio.
    if max_text_tokens is not None and not processor.fits(
        instruction, [], answer, limit=max_text_tokens, history=history
    ):
        tokens = processor.num_tokens(instruction, [], answer, history)
        raise BadAudio("too_many_tokens", f"{tokens} tokens of text, at most {max_text_tokens} (data.max_text_tokens)")
    if not processor.fits(instruction, lengths, answer, new_tokens, history=history):
        tokens = processor.num_tokens(instruction, lengths, answer, history) + new_tokens
        detail = f"{tokens} tokens with its audio, but the language model takes {processor.max_positions}"
        raise BadAudio("too_many_tokens", detail)
