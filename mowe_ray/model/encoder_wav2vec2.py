"""Encoders of the wave itself: Wav2Vec2, HuBERT, WavLM and Data2VecAudio."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Data2VecAudioModel,
    HubertModel,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2Model,
    WavLMModel,
)

from .encoder_base import AudioEncoder
from .frontends import FrontEnd, NormalisedWave


class Wav2Vec2AudioEncoder(AudioEncoder):
    """A stack of strided convolutions over the wave, then a transformer; 50 frames per second.

    Checkpoints whose convolutions use group normalisation (the `base` models) take its statistics
    over time, padding included, and were trained without a mask: a clip's frames depend on how far
    it is padded, so batches should hold clips of like length. Checkpoints with layer normalisation
    get an attention mask, and there padding does not change a clip's frames.
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
        self.model.feature_extractor._requires_grad = False

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """The wave, normalised or not as the checkpoint was trained."""
        return NormalisedWave(preprocessor.get("do_normalize", NormalisedWave.do_normalize))

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """The convolutions."""
        pairs = zip(self.config.conv_kernel, self.config.conv_stride, strict=True)
        return [(kernel, stride, 0) for kernel, stride in pairs]

    @property
    def masks_padding(self) -> bool:
        """True for checkpoints trained with an attention mask."""
        return getattr(self.config, "feat_extract_norm", "layer") == "layer"

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the transformers model, with a sample mask where it was trained with one."""
        mask = None
        if lengths is not None and self.masks_padding:
            # A clip below one receptive field still owns its one frame.
            lengths = lengths.clamp(min=self.min_samples)
            mask = (torch.arange(features.shape[1], device=features.device) < lengths[:, None]).long()
        output = self.model(features, attention_mask=mask, output_hidden_states=all_layers)
        last: Tensor = output.last_hidden_state
        return (*output.hidden_states[:-1], last) if all_layers else last


class HubertAudioEncoder(Wav2Vec2AudioEncoder):
    """HuBERT: the network of Wav2Vec2, trained on cluster targets."""

    model_class = HubertModel


class Data2VecAudioEncoder(Wav2Vec2AudioEncoder):
    """Data2Vec for audio."""

    model_class = Data2VecAudioModel


class WavLMAudioEncoder(Wav2Vec2AudioEncoder):
    """WavLM: HuBERT with gated relative positions."""

    model_class = WavLMModel
    # WavLM hands the raw attention weights to torch, past any LoRA layer around them; only the
    # feed-forward layers are called as modules.
    lora_targets = ("intermediate_dense", "output_dense")
