"""Encoders of the wave itself: Wav2Vec2 and its relatives, and Moonshine."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    Data2VecAudioModel,
    HubertModel,
    PretrainedConfig,
    PreTrainedModel,
    UniSpeechModel,
    UniSpeechSatModel,
    Wav2Vec2ConformerModel,
    Wav2Vec2Model,
    WavLMModel,
)
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder
from transformers.models.speecht5.modeling_speecht5 import SpeechT5EncoderWithSpeechPrenet

from .encoder_base import ENCODERS, AudioEncoder
from .frontends import FrontEnd, NormalisedWave


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation, of single channels or of all together, over the frames that belong to a clip.

    `nn.GroupNorm` takes the statistics over padding as well: a clip then has other features in every batch
    (huggingface/transformers#21534, pytorch/audio#2242).

    Attributes:
        frames: (C,) frames of each clip in the next input; None takes all of them. It stays until it is set again,
            because a checkpointed layer runs once more in the backward pass.
    """

    frames: Tensor | None = None

    @classmethod
    def replacing(cls, norm: nn.GroupNorm) -> "MaskedGroupNorm":
        """Return a masked norm with the parameters of `norm`."""
        assert norm.num_groups in (1, norm.num_channels)
        masked = cls(norm.num_groups, norm.num_channels, norm.eps)
        masked.weight, masked.bias = norm.weight, norm.bias
        return masked

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (C, D, T); what lies behind a clip's frames becomes the bias."""
        if self.frames is None:
            return super().forward(input)
        mask = (torch.arange(input.shape[-1], device=input.device) < self.frames[:, None])[:, None]
        axes = (-1,) if self.num_groups == self.num_channels else (-2, -1)
        count = self.frames[:, None, None] * (input.shape[1] if len(axes) == 2 else 1)
        # Sums in float32 or better, as torch's own norm takes them; the frames themselves keep their type, which halves
        # what autograd holds.
        exact = torch.promote_types(input.dtype, torch.float32)
        mean = input.masked_fill(~mask, 0).sum(axes, keepdim=True, dtype=exact) / count
        centred = (input - mean.to(input.dtype)).masked_fill(~mask, 0)
        variance = torch.linalg.vector_norm(centred, dim=axes, keepdim=True, dtype=exact).square() / count
        scale = (variance + self.eps).rsqrt() * self.weight.to(exact)[:, None]
        return torch.addcmul(self.bias[:, None], centred, scale.to(input.dtype))


@ENCODERS.register("wav2vec2")
class Wav2Vec2AudioEncoder(AudioEncoder):
    """A stack of strided convolutions over the wave, then a transformer; 50 frames per second.

    Padding does not change a clip's frames: they are those of the clip alone. [ours] transformers gives no mask to
    checkpoints whose convolutions use group normalisation (the `base` models); here their statistics are those of the
    clip, and its frames attend to each other only, as if no other clip were there.
    """

    model_class: ClassVar[type[PreTrainedModel]] = Wav2Vec2Model
    model: Wav2Vec2Model | HubertModel | Data2VecAudioModel | WavLMModel

    def __init__(
        self,
        config: PretrainedConfig,
        front_end: FrontEnd,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config, front_end, model)
        # Otherwise transformers makes the *input* require a gradient in training mode, and builds
        # the graph of all convolutions even when they are frozen. The weights do not need it.
        self.convolutions._requires_grad = False
        first = self.convolutions.conv_layers[0]
        norm = getattr(first, "layer_norm", None)
        if isinstance(norm, nn.GroupNorm):
            first.layer_norm = MaskedGroupNorm.replacing(norm)

    @property
    def convolutions(self) -> Any:
        """The module that makes frames of the wave."""
        return self.model.feature_extractor

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """The wave, normalised or not as the checkpoint was trained."""
        return NormalisedWave(preprocessor.get("do_normalize", NormalisedWave.do_normalize))

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """The convolutions."""
        pairs = zip(self.config.conv_kernel, self.config.conv_stride, strict=True)
        return [(kernel, stride, 0) for kernel, stride in pairs]

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the transformers model, with a mask where `lengths` are given."""
        mask = None
        if lengths is not None:
            # A clip below one receptive field still owns its one frame.
            lengths = lengths.clamp(min=self.min_samples)
            mask = (torch.arange(features.shape[1], device=features.device) < lengths[:, None]).long()
        self.mask_convolutions(lengths)
        output = self.model(features, attention_mask=mask, output_hidden_states=all_layers)
        last: Tensor = output.last_hidden_state
        return (*output.hidden_states[:-1], last) if all_layers else last

    def mask_convolutions(self, lengths: Tensor | None) -> None:
        """Prepare the convolutions for clips of `lengths` (C,) samples; None: nothing is padded."""
        norm = getattr(self.convolutions.conv_layers[0], "layer_norm", None)
        if isinstance(norm, MaskedGroupNorm):
            kernel, stride, _ = self.frame_layers[0]
            norm.frames = None if lengths is None else (lengths - kernel) // stride + 1


@ENCODERS.register("hubert")
class HubertAudioEncoder(Wav2Vec2AudioEncoder):
    """HuBERT: the network of Wav2Vec2, trained on cluster targets."""

    model_class = HubertModel


@ENCODERS.register("unispeech")
class UniSpeechAudioEncoder(Wav2Vec2AudioEncoder):
    """UniSpeech: Wav2Vec2, trained with phonemes as well."""

    model_class = UniSpeechModel


@ENCODERS.register("unispeech-sat")
class UniSpeechSatAudioEncoder(Wav2Vec2AudioEncoder):
    """UniSpeech-SAT: HuBERT, trained to tell speakers apart as well."""

    model_class = UniSpeechSatModel

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: PreTrainedModel | None = None) -> None:
        super().__init__(config, front_end, model)
        # Read by transformers' own masking alone, but there without it as well: no gradient would ever come.
        del self.model.masked_spec_embed
        self.model.register_parameter("masked_spec_embed", None)


@ENCODERS.register("data2vec-audio")
class Data2VecAudioEncoder(Wav2Vec2AudioEncoder):
    """Data2Vec for audio: positions come from a stack of convolutions, each of which would spread padding further."""

    model_class = Data2VecAudioModel

    def __init__(
        self,
        config: PretrainedConfig,
        front_end: FrontEnd,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config, front_end, model)
        self._frames: Tensor | None = None
        for layer in cast(nn.ModuleList, self.model.encoder.pos_conv_embed.layers):
            layer.register_forward_hook(self._silence_padding)

    def mask_convolutions(self, lengths: Tensor | None) -> None:
        """Prepare the convolutions, those of the positions too."""
        super().mask_convolutions(lengths)
        self._frames = None if lengths is None else self.num_frames(lengths)

    def _silence_padding(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._frames is None:
            return output
        return silent_behind(output, self._frames)


class RotaryPositions(nn.Module):
    """Cosines and sines of rotary positions (arXiv 2104.09864), whose angles are float32 whatever the weights are.

    Transformers saves the inverse frequencies of this family: a model in bfloat16 rounds them, and is a radian off at
    frame 500. It also keeps what it returned last, in whatever type and mode that was.
    """

    def __init__(self, head_width: int, base: float):
        super().__init__()
        self.head_width, self.base = head_width, base

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (2, T, 1, 1, head width) for hidden states (C, T, D)."""
        even = torch.arange(0, self.head_width, 2, device=hidden.device).float()
        frames = torch.arange(hidden.shape[1], device=hidden.device).float()
        angles = (frames[:, None] / self.base ** (even / self.head_width)).repeat(1, 2)[:, None, None]
        return torch.stack([angles.cos(), angles.sin()]).type_as(hidden)


@ENCODERS.register("wav2vec2-conformer")
class Wav2Vec2ConformerAudioEncoder(Wav2Vec2AudioEncoder):
    """Wav2Vec2 with conformer layers, whose convolutions would spread padding from layer to layer."""

    model_class = Wav2Vec2ConformerModel
    lora_targets = ("linear_q", "linear_k", "linear_v", "linear_out")

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: PreTrainedModel | None = None) -> None:
        super().__init__(config, front_end, model)
        self._frames: Tensor | None = None
        encoder: Any = self.model.encoder
        encoder.pos_conv_embed.requires_grad_(False)  # transformers has it, and does not call it
        for layer in encoder.layers:
            layer.conv_module.depthwise_conv.register_forward_pre_hook(self._silence_padding)
        if config.position_embeddings_type == "rotary":
            head_width = config.hidden_size // config.num_attention_heads
            encoder.embed_positions = RotaryPositions(head_width, config.rotary_embedding_base)

    def mask_convolutions(self, lengths: Tensor | None) -> None:
        """Prepare the convolutions, those of the layers too."""
        super().mask_convolutions(lengths)
        self._frames = None if lengths is None else self.num_frames(lengths)

    def _silence_padding(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self._frames is None else (silent_behind(inputs[0], self._frames),)


def silent_behind(states: Tensor, frames: Tensor) -> Tensor:
    """Set (C, D, T) to zero behind each clip's frames (C,), as a convolution pads the end of a clip alone."""
    behind = torch.arange(states.shape[-1], device=states.device) >= frames[:, None]
    return states.masked_fill(behind[:, None], 0)


@ENCODERS.register("wavlm")
class WavLMAudioEncoder(Wav2Vec2AudioEncoder):
    """WavLM: HuBERT with gated relative positions."""

    model_class = WavLMModel
    # WavLM hands the raw attention weights to torch, past any LoRA layer around them; only the
    # feed-forward layers are called as modules.
    lora_targets = ("intermediate_dense", "output_dense")


@ENCODERS.register("speecht5")
class SpeechT5AudioEncoder(Wav2Vec2AudioEncoder):
    """The speech encoder of SpeechT5, of its recogniser and its voice converter; 50 frames per second."""

    model_class = SpeechT5EncoderWithSpeechPrenet
    key_mapping = MappingProxyType({r"^(speecht5\.)?encoder\.": ""})
    model: Any

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: PreTrainedModel | None = None) -> None:
        super().__init__(config, front_end, model)
        self._frames: Tensor | None = None
        self.model.prenet.pos_conv_embed.register_forward_pre_hook(self._silence_padding)

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """The wave, as a rule not normalised."""
        return NormalisedWave(preprocessor.get("do_normalize", False))

    @property
    def convolutions(self) -> Any:
        """The module that makes frames of the wave."""
        return self.model.prenet.feature_encoder

    def mask_convolutions(self, lengths: Tensor | None) -> None:
        """Prepare the convolutions, that of the positions too."""
        super().mask_convolutions(lengths)
        self._frames = None if lengths is None else self.num_frames(lengths)

    def _silence_padding(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._frames is None:
            return None
        return (silent_behind(inputs[0].transpose(1, 2), self._frames).transpose(1, 2),)


@ENCODERS.register("moonshine")
class MoonshineAudioEncoder(AudioEncoder):
    """The encoder half of a Moonshine checkpoint; 41.7 frames per second.

    Padding does not change a clip's frames: they are those of the clip alone. [ours] transformers normalises the first
    convolution over the padding as well, and lets a clip attend to a frame or two of it.
    """

    model_class = MoonshineEncoder
    key_mapping = MappingProxyType({r"^model\.encoder\.": ""})
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    frame_layers = [(127, 64, 0), (7, 3, 0), (3, 2, 0)]  # noqa: RUF012 - the architecture's, in every checkpoint

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: PreTrainedModel | None = None) -> None:
        super().__init__(config, front_end, model)
        self.model.groupnorm = MaskedGroupNorm.replacing(cast(nn.GroupNorm, self.model.groupnorm))

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """The wave, as a rule not normalised."""
        return NormalisedWave(preprocessor.get("do_normalize", False))

    @property
    def num_layers(self) -> int:
        """L, layers of the encoder; the configuration's own number is the decoder's."""
        return int(self.config.encoder_num_hidden_layers)

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the transformers model, with a mask where `lengths` are given."""
        mask, norm = None, self.model.groupnorm
        assert isinstance(norm, MaskedGroupNorm)
        norm.frames = None
        if lengths is not None:
            lengths = lengths.clamp(min=self.min_samples)
            kernel, stride, _ = self.frame_layers[0]
            norm.frames = (lengths - kernel) // stride + 1
            # transformers takes every 384th sample of a mask: the one with which a frame begins.
            last_begin = (self.num_frames(lengths) - 1) * 384
            mask = (torch.arange(features.shape[1], device=features.device) <= last_begin[:, None]).long()
        output = self.model(features, attention_mask=mask, output_hidden_states=all_layers)
        last: Tensor = output.last_hidden_state
        return (*output.hidden_states[:-1], last) if all_layers else last
