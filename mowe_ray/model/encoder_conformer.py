"""Conformers over filter banks: Wav2Vec2-BERT, SeamlessM4T, Parakeet's FastConformer and LASR."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LasrEncoder, ParakeetEncoder, PretrainedConfig, PreTrainedModel, Wav2Vec2BertModel
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2SpeechEncoder

from .encoder_base import ENCODERS, AudioEncoder
from .frontends import FrontEnd, NemoLogMel, StackedFbank
from .frontends_asr import LasrLogMel, frames_of


@ENCODERS.register("wav2vec2-bert")
class Wav2Vec2BertAudioEncoder(AudioEncoder):
    """Wav2Vec2-BERT (w2v-BERT 2.0): a conformer with causal convolutions over pairs of filter banks; 50 per second."""

    model_class: ClassVar[type[PreTrainedModel]] = Wav2Vec2BertModel
    lora_targets = ("linear_q", "linear_k", "linear_v", "linear_out")

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """As many bands as two frames have inputs."""
        return StackedFbank(n_mels=config.feature_projection_input_dim // 2)

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Filter-bank frames, then pairs of them."""
        return [(400, 160, 0), (2, 2, 0)]

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the transformers model, with a mask where `lengths` are given."""
        mask = None
        if lengths is not None:
            mask = torch.arange(features.shape[1], device=features.device) < self.num_frames(lengths)[:, None]
        output = self.model(features, attention_mask=mask, output_hidden_states=all_layers)
        last: Tensor = output.last_hidden_state
        return (*output.hidden_states[:-1], last) if all_layers else last


@ENCODERS.register("seamless_m4t")
class SeamlessAudioEncoder(Wav2Vec2BertAudioEncoder):
    """The speech encoder of SeamlessM4T, without the adapter that shortens it eightfold; 50 frames per second."""

    model_class: ClassVar[type[PreTrainedModel]] = SeamlessM4TSpeechEncoder
    key_mapping = MappingProxyType({r"^speech_encoder\.": ""})

    @property
    def num_layers(self) -> int:
        """L, layers of the speech encoder; the configuration's own number is the decoder's."""
        return int(self.config.speech_encoder_layers)


@ENCODERS.register("seamless_m4t_v2")
class SeamlessV2AudioEncoder(SeamlessAudioEncoder):
    """The speech encoder of SeamlessM4T v2, which attends within chunks, and to those before."""

    model_class = SeamlessM4Tv2SpeechEncoder


@ENCODERS.register("parakeet_encoder")
class ParakeetAudioEncoder(AudioEncoder):
    """The FastConformer of NVIDIA's Parakeet: a spectrogram shortened eightfold by convolutions; 12.5 per second."""

    model_class = ParakeetEncoder
    key_mapping = MappingProxyType({r"^(model\.)?(encoder|audio_tower)\.": ""})
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """As many bands as the first convolution reads."""
        return NemoLogMel(n_mels=config.num_mel_bins)

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Spectrogram hop, then a halving convolution for each factor of 2."""
        config = self.config
        kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
        halvings = config.subsampling_factor.bit_length() - 1
        return [(160, 160, 0)] + [(kernel, stride, (kernel - 1) // 2)] * halvings

    @property
    def first_centre(self) -> float:
        """The first sample: windows of the spectrogram are centred on multiples of its hop."""
        return 0.0

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the transformers model, with a mask where `lengths` are given."""
        mask = None
        if lengths is not None:
            mask = torch.arange(features.shape[1], device=features.device) < (lengths // 160).clamp(min=1)[:, None]
        output = self.model(features, attention_mask=mask, output_hidden_states=all_layers)
        last: Tensor = output.last_hidden_state
        return (*output.hidden_states[:-1], last) if all_layers else last


@ENCODERS.register("lasr_encoder")
class LasrAudioEncoder(AudioEncoder):
    """The conformer of LASR, the family of Google's MedASR: filter banks shortened fourfold; 25 per second."""

    model_class = LasrEncoder
    key_mapping = MappingProxyType({r"^encoder\.": ""})
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """As many bands as the first layer reads."""
        return LasrLogMel(n_mels=config.num_mel_bins)

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Filter-bank frames, then two convolutions."""
        convolution = (self.config.subsampling_conv_kernel_size, self.config.subsampling_conv_stride, 0)
        return [(400, 160, 0), convolution, convolution]

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the transformers model, with a mask where `lengths` are given."""
        mask = None
        if lengths is not None:
            own = frames_of(lengths.clamp(min=self.min_samples))
            mask = torch.arange(features.shape[1], device=features.device) < own[:, None]
        output = self.model(features, attention_mask=mask, output_hidden_states=all_layers)
        last: Tensor = output.last_hidden_state
        return (*output.hidden_states[:-1], last) if all_layers else last
