"""Embeddings of prompts, with the audio in its places; and `MoweFront`, the part of a model that makes them.

Legend: B rows, N tokens, W width of the language model, C clips, S samples at 16 kHz.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_mowe import MoweConfig
from .instructions import check_audio_tokens, clip_instructions
from .pool import on_host
from .tower import AudioTokens, AudioTower


def place_audio(embeds: Tensor, is_audio: np.ndarray, audio: AudioTokens | None) -> Tensor:
    """Return embeddings of rows (B, N, W) with the audio in its places.

    Args:
        embeds: (B, N, W) of the words.
        is_audio: (B, N) bool, where the audio tokens are.
        audio: Of all clips, in row order; None without any.

    Raises:
        ValueError: if audio tokens and clips do not match.
    """
    places = np.flatnonzero(is_audio)
    counts = [] if audio is None else audio.valid
    check_audio_tokens(len(places), sum(counts))
    if audio is None:
        return embeds
    if not sum(counts):
        # Keeps the audio side in the graph: every rank has to reduce the same gradients, also one without clips.
        return embeds + (audio.tokens.sum() * 0).to(embeds.dtype)
    longest = audio.tokens.shape[1]
    counted = np.concatenate([np.arange(count) + clip * longest for clip, count in enumerate(counts)])
    tokens = audio.tokens.flatten(0, 1)[on_device_of(counted, embeds)].to(embeds.dtype)
    return embeds.flatten(0, 1).index_copy(0, on_device_of(places, embeds), tokens).view_as(embeds)


def on_device_of(numbers: np.ndarray, tensor: Tensor) -> Tensor:
    """Return integers of the host on a tensor's device."""
    return torch.from_numpy(numbers).to(tensor.device, non_blocking=True)


class MoweFrontConfig(MoweConfig):
    """Configuration of `MoweFront`: that of the whole model, under another name."""

    model_type: ClassVar[str] = "mowe_front"


class MoweFront(PreTrainedModel):
    """A model without the layers of its language model: makes the embeddings that a plain one continues.

    Args:
        config: Of the whole model.
        audio_tower: With its weights; None builds it with random ones.
        embeddings: The language model's token embeddings, likewise.
    """

    config_class = MoweFrontConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: MoweFrontConfig, audio_tower: AudioTower | None = None, embeddings: nn.Module | None = None
    ):
        super().__init__(config)
        self.audio_tower = audio_tower or AudioTower(config)
        if embeddings is None:
            with torch.device("meta"):
                embeddings = AutoModelForCausalLM.from_config(config.text_config).get_input_embeddings()
            embeddings.to_empty(device=torch.get_default_device())
        self.embeddings = embeddings
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Some embeddings are scaled by a number that is not stored.
        scale = getattr(module, "scalar_embed_scale", None)
        if scale is not None:
            module.get_buffer("embed_scale").fill_(scale)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings (B, N, W) of prompts, for the `inputs_embeds` of the language model.

        Args:
            input_ids: (B, N), with one audio token per downsampled frame of every clip.
            attention_mask: (B, N), 0 on padding.
            input_values: (C, S) float32 waveforms; None for text alone.
            input_lengths: (C,) valid samples.
        """
        is_audio = input_ids == self.config.audio_token_id
        audio = prompts = None
        if input_lengths is not None:
            if self.config.reads_prompt:
                counts = self.audio_tower.token_counts(input_lengths.tolist())
                prompts = clip_instructions(self.embeddings, input_ids, is_audio, counts, attention_mask=attention_mask)
            audio = self.audio_tower(input_values, input_lengths, None, None, prompts)
        return place_audio(self.embeddings(input_ids.masked_fill(is_audio, 0)), on_host(is_audio), audio)
