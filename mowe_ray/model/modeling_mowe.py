"""`MoweForConditionalGeneration`: an AudioLLM with a base encoder and a routed pool of weak encoders.

Legend: B batch rows, N tokens of a row, C clips of the batch in row order, S samples at 16 kHz,
V vocabulary; L layers, T frames and E width of an audio encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_mowe import EncoderSpec, MoweConfig
from .encoders import AudioEncoder
from .instructions import clip_instructions
from .lora import inject_lora
from .pool import on_host
from .prompt_embeddings import on_device_of, place_audio
from .routing import RoutingRecord
from .routing_loss import RoutingTotals, routing_loss
from .tower import AudioTokens, AudioTower, PreparedAudio


@dataclass
class MoweOutput(ModelOutput):
    """Output of `MoweForConditionalGeneration.forward`.

    Attributes:
        loss: `lm_loss + mowe_loss_weight * routing_loss`, when there are labels.
        logits: (B, N, V); in training with labels only the answers', (answer tokens, V).
        lm_loss: Next-token loss: the sum over this batch's answer tokens / `num_items_in_batch`.
        routing_loss: L_MoWE, unweighted: this batch's share of the global one.
        routing_losses: The same of each part of L_MoWE by name, without the weights of the parts.
        routing: The routers' decisions; None without audio outside training.
        past_key_values: The language model's cache.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    routing_loss: Tensor | None = None
    routing_losses: dict[str, Tensor] | None = None
    routing: RoutingRecord | None = None
    past_key_values: Any = None


class MoweForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Base encoder, routed pool, adapter and language model.

    Args:
        config: Everything needed to build it with random weights.
        base_encoder, weak_encoders, language_model: Parts with weights, to be used instead.

    Attributes:
        enter_idle_encoders: Enter every encoder in every forward outside training too. Ranks of a
            sharded model need it: they must gather the same weights in the same order.
    """

    config: MoweConfig
    config_class = MoweConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: MoweConfig,
        base_encoder: AudioEncoder | None = None,
        weak_encoders: Sequence[AudioEncoder] | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        for part in (base_encoder, language_model, *(weak_encoders or ())):
            for module in part.modules() if part is not None else ():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.audio_tower = AudioTower(config, base_encoder, weak_encoders)
        # The default dtype, because transformers builds this very model inside the dtype asked for.
        self.language_model: PreTrainedModel = language_model or AutoModelForCausalLM.from_config(
            config.text_config, dtype=torch.get_default_dtype()
        )
        for path, lora in (config.lora or {}).items():
            inject_lora(self.get_submodule(path), **lora)
        self.apply_train_modes()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Torch's own initialisation suits the adapter; encoders and language model bring theirs.
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or hub id as transformers does, and freeze again what was frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        # With `output_loading_info` it is a pair.
        (loaded[0] if isinstance(loaded, tuple) else loaded).apply_train_modes()
        return loaded

    def apply_train_modes(self) -> None:
        """Freeze the encoders that the configuration calls frozen, and what LoRA adapts."""
        for path in self.config.lora or {}:
            for name, parameter in self.get_submodule(path).named_parameters():
                parameter.requires_grad_(".lora_" in name)
        specs = [self.config.base_encoder, *(self.config.weak_encoders or [])]
        for spec, encoder in zip(specs, self.audio_tower.encoders(), strict=True):
            if cast(EncoderSpec, spec).train == "frozen":
                encoder.requires_grad_(False)
            # Frozen encoders go to evaluation mode, and stay in it: see `AudioEncoder.train`.
            encoder.train(encoder.training)

    @property
    def enter_idle_encoders(self) -> bool:
        """See the class."""
        return self.audio_tower.enter_idle_encoders

    @enter_idle_encoders.setter
    def enter_idle_encoders(self, value: bool) -> None:
        self.audio_tower.enter_idle_encoders = value

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's token embeddings."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language model's head."""
        head: nn.Module | None = self.language_model.get_output_embeddings()
        return head

    def prepare_audio(
        self,
        input_values: Tensor | None,
        input_lengths: Tensor | None,
        encoder_states: Mapping[int, Tensor] | None = None,
        present: Tensor | None = None,
        **texts: Tensor | None,
    ) -> PreparedAudio:
        """Run base encoder and routers without a graph, to learn `totals` before the loss.

        Add up the totals of all micro-batches on all ranks, and pass the sum as `routing_totals` to
        the forward of each, along with its `prepared_audio`, which saves a frozen base encoder from
        running twice.

        Args:
            input_values, input_lengths, encoder_states, present: As in `forward`.
            **texts: `input_ids`, `attention_mask` and `labels` as in `forward`, for routers that read instructions.
        """
        prompts = self._prompts(input_lengths, **texts)
        return self.audio_tower.prepare(input_values, input_lengths, encoder_states, prompts, present)

    def encode_audio(
        self,
        input_values: Tensor | None = None,
        input_lengths: Tensor | None = None,
        encoder_states: Mapping[int, Tensor] | None = None,
        prepared_audio: PreparedAudio | None = None,
        present: Tensor | None = None,
        **texts: Tensor | None,
    ) -> AudioTokens | None:
        """Run encoders, routers and adapter: the part that forward and generate share.

        Args:
            input_values, input_lengths, encoder_states, prepared_audio, present: As in `forward`.
            **texts: As in `prepare_audio`.

        Returns:
            None for text alone, unless idle encoders are entered: then tokens that do not count.
        """
        silent = not len(input_lengths) if input_lengths is not None else True
        if prepared_audio is not None:
            silent = prepared_audio.is_dummy
        if silent and not (self.training or self.enter_idle_encoders):
            return None
        prompts = None if prepared_audio is not None else self._prompts(input_lengths, **texts)
        if silent:
            input_values = input_lengths = None
        encoded: AudioTokens = self.audio_tower(
            input_values, input_lengths, prepared_audio, encoder_states, prompts, present
        )
        return encoded

    def _prompts(
        self,
        input_lengths: Tensor | None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | None:
        """Return the mean token embedding (C, W) of the instruction that each clip comes with, if routers read it."""
        if not self.config.reads_prompt:
            return None
        if input_ids is None:
            raise ValueError(
                f"model.router.input={self.config.router_input}: the audio's input_ids are needed to route it"
            )
        return clip_instructions(
            self.get_input_embeddings(),
            input_ids,
            input_ids == self.config.audio_token_id,
            [] if input_lengths is None else self.audio_tower.token_counts(input_lengths.tolist()),
            attention_mask=attention_mask,
            labels=labels,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_values: Tensor | None = None,
        input_lengths: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        routing_totals: RoutingTotals | None = None,
        prepared_audio: PreparedAudio | None = None,
        prepare_only: bool = False,
        encoder_states: Mapping[int, Tensor] | None = None,
        audio: AudioTokens | None = None,
        present: Tensor | None = None,
        answers_only: bool | None = None,
        **kwargs: Any,
    ) -> MoweOutput | PreparedAudio:
        """Predict the answers' tokens.

        With `num_items_in_batch` and `routing_totals` of the global batch, the losses of all its micro-batches sum to
        the global loss, and their gradients to its gradient. Without them, this batch is the global batch.

        Args:
            input_ids: (B, N), with one audio token per downsampled frame of every clip.
            attention_mask: (B, N), 0 on padding.
            labels: (B, N), -100 wherever nothing is to be learned.
            input_values: (C, S) float32 waveforms; None or empty for text alone.
            input_lengths: (C,) valid samples.
            num_items_in_batch: Answer tokens of the global batch.
            routing_totals: Routing sums of the global batch.
            prepared_audio: What `prepare_audio` returned for this batch's audio, which is then not needed.
            prepare_only: Return `prepare_audio`'s result: a way in for engines that wrap forward alone.
            encoder_states: What frozen encoders make of the clips, (C, L, T, E) by index in `audio_tower.encoders()`,
                padded with zeros: these encoders do not run. L is 1, or all layers for `weighted_sum`. C may be 0.
            audio: What `encode_audio` returned for this batch, in place of the other audio arguments.
            present: (C, M) bool, the pool members that each clip may use, for `training.pool_dropout`; None for all.
            answers_only: Whether logits are those of the A learned tokens, (A, V), not (B, N, V); None: in training.
            **kwargs: For the language model.

        Raises:
            ValueError: if audio tokens and clips do not match.
        """
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if prepare_only:
            return self.prepare_audio(input_values, input_lengths, encoder_states, present, **texts)
        assert input_ids is not None
        if audio is None:
            audio = self.encode_audio(input_values, input_lengths, encoder_states, prepared_audio, present, **texts)
        record = None if audio is None else audio.record
        is_audio, is_answer = self._positions(input_ids, labels)
        embeds = self._embed(input_ids, is_audio, audio)
        if labels is None:
            output = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
            return MoweOutput(logits=output.logits, routing=record, past_key_values=output.get("past_key_values"))
        inputs = {"use_cache": False, **kwargs, "inputs_embeds": embeds, "attention_mask": attention_mask}
        logits, lm_loss = self._answer_loss(inputs, labels, is_answer, num_items_in_batch, answers_only)
        if record is None:
            return MoweOutput(lm_loss, logits, lm_loss)
        mowe, parts = self._routing_loss(record, routing_totals, lm_loss.device)
        return MoweOutput(lm_loss + self.config.mowe_loss_weight * mowe, logits, lm_loss, mowe, parts, record)

    def _routing_loss(
        self, record: RoutingRecord, totals: RoutingTotals | None, device: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        weights, z_weight = config.mowe_loss_parts, config.mowe_z_weight
        total, parts = routing_loss(record, kind=config.mowe_loss, z_weight=z_weight, weights=weights, totals=totals)
        return total.to(device), parts

    def _positions(self, input_ids: Tensor, labels: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        """Return where audio tokens are and from where answers are predicted, (B, N) bool each, in one read."""
        is_audio = input_ids == self.config.audio_token_id
        is_answer = torch.zeros_like(is_audio) if labels is None else _next_labels(labels) != -100
        audio, answers = on_host(torch.stack([is_audio, is_answer]))
        return audio, answers

    def _embed(self, input_ids: Tensor, is_audio: np.ndarray, audio: AudioTokens | None) -> Tensor:
        """Return the rows' embeddings (B, N, W) with the audio in its places."""
        # After the embedding module, which in some models scales; the audio's own scale is learned.
        words = input_ids.masked_fill(input_ids == self.config.audio_token_id, 0)
        embeds: Tensor = self.get_input_embeddings()(words)
        return place_audio(embeds, is_audio, audio)

    def _answer_loss(
        self,
        inputs: dict[str, Any],
        labels: Tensor,
        is_answer: np.ndarray,
        num_items: Tensor | int | None,
        answers_only: bool | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits to report, and the next-token loss of the A answer tokens."""
        places = on_device_of(np.flatnonzero(is_answer), labels)
        targets = _next_labels(labels).flatten()[places]  # (A,)
        # With a large vocabulary the others' logits take gigabytes, and much of the time.
        if self.training if answers_only is None else answers_only:
            logits = answers = self._logits_at(places, inputs)
        else:
            logits = self.language_model(**inputs).logits
            answers = logits.flatten(0, 1)[places]  # (A, V)
        count = max(len(targets), 1) if num_items is None else num_items
        # The sum of no terms keeps its graph: a batch without answers still takes part in the backward pass.
        loss = F.cross_entropy(answers.float(), targets, reduction="sum") / count
        return logits, loss

    def _logits_at(self, places: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return the logits (A, V) of A of the B * N positions; the head gets these alone, at least one."""
        kept = places if len(places) else places.new_zeros(1)
        calls = 0

        def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal calls
            calls += 1
            hidden, *rest = args
            return (hidden.flatten(0, -2)[kept][None], *rest)

        # After it a language model scales or caps its logits, each by itself.
        head = self.language_model.get_output_embeddings()
        hook = None if head is None else head.register_forward_pre_hook(select)
        try:
            logits: Tensor = self.language_model(**inputs).logits
        finally:
            if hook is not None:
                hook.remove()
        found = logits.flatten(0, 1)
        return (found if calls == 1 else found[kept])[: len(places)]

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_lengths: Tensor | None = None,
        encoder_states: Mapping[int, Tensor] | None = None,
        audio: AudioTokens | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts that are padded on the left.

        Args:
            input_ids: (B, N), as in `forward`, like the next five.
            attention_mask: (B, N).
            input_values: (C, S).
            input_lengths: (C,).
            encoder_states: As in `forward`.
            audio: What `encode_audio` returned for this batch, in place of the last three.
            **kwargs: For the language model's `generate`: `max_new_tokens`, `num_beams`,
                `synced_gpus`...

        Returns:
            Prompts and new tokens, (B, N + new tokens), as elsewhere in transformers.
        """
        if audio is None:
            audio = self.encode_audio(
                input_values, input_lengths, encoder_states, input_ids=input_ids, attention_mask=attention_mask
            )
        is_audio, _ = self._positions(input_ids, None)
        embeds = self._embed(input_ids, is_audio, audio)
        self.language_model.generation_config = kwargs.pop("generation_config", None) or self.generation_config
        # The vocabulary of the language model may end before the audio token.
        words = input_ids.masked_fill(input_ids == self.config.audio_token_id, 0)
        output = self.language_model.generate(  # type: ignore[operator]
            input_ids=words, inputs_embeds=embeds, attention_mask=attention_mask, **kwargs
        )
        sequences = output if isinstance(output, Tensor) else output.sequences
        sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        return output


def _next_labels(labels: Tensor) -> Tensor:
    """Return labels (B, N) where they are predicted: one position to the left."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)
