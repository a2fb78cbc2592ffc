"""Encoders of speech recognisers that transformers runs without a mask, or without one of their convolutions.

Speech2Text, Fun-ASR-Nano and Granite Speech: a clip's frames are here those of the clip alone.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import FunAsrNanoEncoder, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechCTCEncoder
from transformers.models.granite_speech_plus.modeling_granite_speech_plus import GraniteSpeechPlusCTCEncoder
from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextEncoder

from .encoder_base import ENCODERS, AudioEncoder
from .encoder_wav2vec2 import silent_behind
from .frontends import FrontEnd, count_frames
from .frontends_asr import CmvnFbank, PairedLogMel, StackedFrames


class _PlainEncoder(AudioEncoder):
    """An encoder whose modules are called one by one."""

    model: Any

    def own_frames(self, hidden: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Mark (C, T) which of the frames (C, T, D) belong to a clip; None: all."""
        if lengths is None:
            return None
        own = self.num_frames(lengths.clamp(min=self.min_samples))
        return torch.arange(hidden.shape[1], device=hidden.device) < own[:, None]

    def attention_mask(self, hidden: Tensor, valid: Tensor | None) -> Tensor | None:
        """The mask of transformers for `own_frames`."""
        if valid is None:
            return None
        mask = create_bidirectional_mask(config=self.model.config, inputs_embeds=hidden, attention_mask=valid)
        return cast("Tensor | None", mask)


@ENCODERS.register("speech_to_text")
class Speech2TextAudioEncoder(_PlainEncoder):
    """The encoder of fairseq's S2T: filter banks shortened fourfold by convolutions; 25 per second."""

    model_class = Speech2TextEncoder
    key_mapping = MappingProxyType({r"^(model\.)?encoder\.": ""})

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: PreTrainedModel | None = None) -> None:
        super().__init__(config, front_end, model)
        self._lengths: Tensor | None = None
        for number, convolution in enumerate(self.model.conv.conv_layers):
            if number:
                layers = self.frame_layers[: number + 1]
                convolution.register_forward_pre_hook(lambda _, inputs, layers=layers: self._silence(inputs, layers))

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """As many bands as the first convolution reads, normalised as the checkpoint was trained."""
        normalise = preprocessor.get("do_ceptral_normalize", True)
        means, variances = (preprocessor.get(name, True) for name in ("normalize_means", "normalize_vars"))
        return CmvnFbank(config.input_feat_per_channel, normalise and means, normalise and variances)

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Filter-bank frames, then the convolutions."""
        return [(400, 160, 0), *((kernel, 2, kernel // 2) for kernel in self.config.conv_kernel_sizes)]

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Attend to each clip's own frames."""
        model, self._lengths = self.model, lengths
        hidden = model.embed_scale * model.conv(features)
        valid = self.own_frames(hidden, lengths)
        padding = torch.zeros_like(hidden[..., 0]).long() if valid is None else (~valid).long()
        hidden = hidden + model.embed_positions(padding).to(hidden.dtype)
        hidden = F.dropout(hidden, p=model.dropout, training=model.training)
        mask, states = self.attention_mask(hidden, valid), [hidden]
        for layer in model.layers:
            hidden = layer(hidden, mask)
            states = [*states, hidden] if all_layers else [hidden]
        last: Tensor = model.layer_norm(hidden)
        return (*states[:-1], last) if all_layers else last

    def _silence(self, inputs: tuple[Tensor], layers: list[tuple[int, int, int]]) -> tuple[Tensor] | None:
        if self._lengths is None:
            return None
        return (silent_behind(inputs[0], count_frames(self._lengths.clamp(min=self.min_samples), layers)),)


@ENCODERS.register("fun_asr_nano_encoder")
class FunAsrNanoTower(_PlainEncoder):
    """The audio tower of Fun-ASR-Nano, SenseVoice's: memory blocks beside attention; 16.7 frames per second.

    Its first layer changes the width: here it is a part of the input, so that all hidden states have one width. [ours]
    """

    model_class = FunAsrNanoEncoder
    key_mapping = MappingProxyType({r"^(model\.)?audio_tower\.": ""})
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """As many bands as the first layer has inputs for."""
        stacked = preprocessor.get("num_frames_lfr", StackedFrames.stacked)
        stride = preprocessor.get("stride_lfr", StackedFrames.stride)
        return StackedFrames(config.input_size // stacked, stacked, stride)

    @property
    def num_layers(self) -> int:
        """L, layers behind the first one."""
        return int(self.config.num_hidden_layers) - 1

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Filter-bank frames, then every sixth of them."""
        assert isinstance(self.front_end, StackedFrames)
        return [(400, 160, 0), (1, self.front_end.stride, 0)]

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Attend to, and remember, each clip's own frames."""
        model = self.model
        valid = self.own_frames(features, lengths)
        mask = self.attention_mask(features, valid)
        own = torch.ones_like(features[..., 0]).bool() if valid is None else valid
        hidden = features * model.scaling + model.position_embeddings(features)
        states: list[Tensor] = []
        for layer in model.layers:
            hidden = layer(hidden, mask, own)
            states = [*states, hidden] if all_layers else [hidden]
        return tuple(states) if all_layers else states[-1]


class BlockAttention(nn.Module):
    """Granite Speech's attention within blocks, to the frames that belong to a clip.

    Attributes:
        own: (C, T) which they are; None: all. It stays until it is set again, as in `MaskedGroupNorm`.
    """

    own: Tensor | None = None

    def __init__(self, attention: Any):
        super().__init__()
        self.num_heads, self.scale, self.context_size = attention.num_heads, attention.scale, attention.context_size
        self.pre_norm, self.to_q, self.to_kv = attention.pre_norm, attention.to_q, attention.to_kv
        self.to_out, self.rel_pos_emb, self.dropout = attention.to_out, attention.rel_pos_emb, attention.dropout

    def forward(self, hidden_states: Tensor, attention_dists: Tensor) -> Tensor:
        """Attend within blocks of (C, T, D), with Shaw's relative positions (arXiv 1803.02155)."""
        clips, frames, _ = hidden_states.shape
        missing = -frames % self.context_size
        hidden = F.pad(self.pre_norm(hidden_states), (0, 0, 0, missing))
        query, key, value = (
            projected.reshape(-1, self.context_size, *projected.shape[2:])
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)
            for projected in (self.to_q(hidden), *self.to_kv(hidden).chunk(2, dim=-1))
        )
        bias = torch.einsum("bhcd,crd->bhcr", query, self.rel_pos_emb(attention_dists)) * self.scale
        own = hidden.new_ones(clips, frames, dtype=torch.bool) if self.own is None else self.own
        is_frame = F.pad(own, (0, missing)).reshape(-1, 1, 1, self.context_size)
        bias = bias.masked_fill(~is_frame, torch.finfo(bias.dtype).min)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        joined = attended.transpose(1, 2).reshape(clips, frames + missing, -1)[:, :frames]
        projected: Tensor = self.dropout(self.to_out(joined))
        return projected


@ENCODERS.register("granite_speech_encoder")
class GraniteSpeechTower(_PlainEncoder):
    """The conformer of Granite Speech: attention within blocks of 4 s; 50 frames per second.

    transformers has no mask for it. Here a clip attends to its own frames, and its convolutions end with it. [ours]
    """

    model_class: ClassVar[type[PreTrainedModel]] = GraniteSpeechCTCEncoder
    key_mapping = MappingProxyType({r"^(model\.)?encoder\.": ""})
    lora_targets = ("to_q", "to_kv", "to_out")

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: PreTrainedModel | None = None) -> None:
        super().__init__(config, front_end, model)
        self._frames: Tensor | None = None
        for layer in self.model.layers:
            layer.attn = BlockAttention(layer.attn)
            layer.conv.depth_conv.register_forward_pre_hook(self._silence_padding)

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """As many bands as two frames have inputs."""
        return PairedLogMel(n_mels=config.input_dim // 2)

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Spectrogram frames around multiples of the hop, then pairs of them."""
        return [(2, 160, 1), (2, 2, 0)]

    @property
    def first_centre(self) -> float:
        """Between the first sample and the next multiple of the hop."""
        return 80.0

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the layers; half-way, what a recogniser would say here is added."""
        model, valid = self.model, self.own_frames(features, lengths)
        self._frames = None if valid is None else valid.sum(1)
        hidden = model.input_linear(features)
        states = [hidden]
        for number, layer in enumerate(model.layers, start=1):
            layer.attn.own = valid
            hidden = layer(hidden, attention_dists=model.attention_dists)
            if number == model.num_layers // 2:
                hidden = hidden + model.out_mid(model.out(hidden).softmax(-1))
            states = [*states, hidden] if all_layers else [hidden]
        return tuple(states) if all_layers else states[-1]

    def _silence_padding(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self._frames is None else (silent_behind(inputs[0], self._frames),)


@ENCODERS.register("granite_speech_plus_encoder")
class GraniteSpeechPlusTower(GraniteSpeechTower):
    """The conformer of Granite Speech Plus, whose earlier layers are here hidden states, not a part of the output."""

    model_class = GraniteSpeechPlusCTCEncoder
