"""What routers read of an instruction: the mean embedding of its tokens, for each clip that comes with it.

Legend: B rows, N tokens of a row, C clips of the batch in row order, W width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def clip_instructions(
    embed: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    is_audio: Tensor,
    counts: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Average the token embeddings of each clip's instruction, in float32: (C, W).

    The instruction is what stands before its row's first answer, without the audio tokens and without padding; a row
    that has none gets zeros. Without gradient: the embeddings serve the language model, and routers only read them.

    Args:
        embed: The language model's embeddings, which run also without clips: all ranks gather their weights together.
        input_ids: (B, N).
        is_audio: (B, N) bool, which of them are audio tokens.
        counts: Audio tokens of each clip.
        attention_mask: (B, N), 0 on padding; None where nothing but answers is padded.
        labels: (B, N), -100 but on answers; None for prompts.

    Raises:
        ValueError: The clips have other numbers of audio tokens than the rows.
    """
    counted = ~is_audio
    if attention_mask is not None:
        counted = counted & attention_mask.bool()
    if labels is not None:
        counted = counted & ((labels != -100).cumsum(1) == 0)
    embeds = embed(input_ids.masked_fill(is_audio, 0)).float()
    means = (embeds * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp(min=1)
    if not counts:
        return means[:0]
    return means[torch.tensor(rows_of_clips(is_audio.sum(1).tolist(), counts)).to(means.device, non_blocking=True)]


def rows_of_clips(audio_tokens: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Return the row of each clip, from the audio tokens that each row holds and those that each clip makes.

    Raises:
        ValueError: They do not match.
    """
    check_audio_tokens(sum(audio_tokens), sum(counts))
    # A clip stands in the first row up to whose end there are as many tokens as up to the clip's.
    return [int(row) for row in np.searchsorted(np.cumsum(audio_tokens), np.cumsum(counts))]


def check_audio_tokens(placeholders: int, tokens: int) -> None:
    """Raise ValueError unless a batch holds as many audio tokens as its clips make."""
    if placeholders != tokens:
        raise ValueError(
            f"input_ids holds {placeholders} audio tokens, but the clips make {tokens}: "
            "build the inputs with the MoweProcessor saved beside this model"
        )
