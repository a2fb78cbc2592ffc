"""Base class of the audio encoders of a MoWE model.

A new family is one subclass of `AudioEncoder`, entered in `ENCODERS` (see `encoder_wav2vec2.py` for the shortest ones);
`tests/unit/model/test_encoders_contract.py` then checks it.

Shapes: C clips, S samples, T frames, D width, L layers.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .frontends import SAMPLE_RATE, FrontEnd, Samples, count_frames
from .registry import Registry

PadAudio = Literal["bucket", "full30"]

# transformers would mask and skip at random on its own account, hold parameters that only its
# masking reads, and shorten the frames with a text-alignment adapter. Here the trainer decides on
# augmentation, every trainable tensor must get a gradient, and MoWE has its own adapter.
_QUIET = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "speech_encoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "add_adapter": False,
}


def _mask_as_given(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make the mask of `sdpa`, but read no tensor to see whether it masks anything: the host would wait for that."""
    return sdpa_mask(*args, **kwargs | {"allow_is_bidirectional_skip": False})


# The attention of encoders: torch's, as transformers runs it. A mask is given only where the host knows of padding.
_ATTENTION = "sdpa_mask_as_given"
AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
AttentionMaskInterface.register(_ATTENTION, _mask_as_given)


ENCODERS: Registry[type["AudioEncoder"]] = Registry("model.weak_encoders.N.checkpoint.config.model_type")
"""Adapter class by the `model_type` of a transformers configuration."""


class AudioEncoder(nn.Module, ABC):
    """A transformers audio encoder behind one interface: features in, frames out.

    Args:
        config: configuration of the checkpoint the encoder comes from.
        front_end: what turns waves into this encoder's features.
        model: the encoder with its weights; None builds it with new random weights.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    """The transformers class of the encoder alone."""

    key_mapping: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Regular expressions that rename a checkpoint's keys to those of `model_class`."""

    sees_padding: ClassVar[bool] = False
    """Whether padding is part of what it takes in: it was trained without a mask, on windows of one length."""

    sample_rate: ClassVar[int] = SAMPLE_RATE
    """Hz that its checkpoints were trained on; the front-end resamples."""

    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Names of the linear layers that LoRA adapts: the attention, unless LoRA is dead there."""

    _recomputes = False

    def __init__(
        self,
        config: PretrainedConfig,
        front_end: FrontEnd,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.config = self.quiet(config)
        self.front_end = front_end
        self.model = self.model_class(self.config) if model is None else model
        if self.model.config._attn_implementation == "sdpa":
            self.model.config._attn_implementation = _ATTENTION

    @staticmethod
    def quiet(config: PretrainedConfig) -> PretrainedConfig:
        """A copy of `config` without transformers' own random masking, skipping and adapters."""
        config = copy.deepcopy(config)
        for name, value in _QUIET.items():
            if hasattr(config, name):
                setattr(config, name, value)
        return config

    @classmethod
    @abstractmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """The front-end of a checkpoint.

        Args:
            config: the checkpoint's configuration; it decides whatever fixes a weight's shape.
            preprocessor: its preprocessor_config.json, {} when it has none.
        """

    @property
    @abstractmethod
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """(kernel, stride, padding) of the layers in time, from 16 kHz samples to frames."""

    @abstractmethod
    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """`forward` without the care for dtype and frozen weights."""

    def forward(
        self, features: Tensor, all_layers: bool = False, lengths: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Encode features to frames.

        Args:
            features: (C, ...) what `front_end` returned for waves of one padded length S.
            all_layers: also return the intermediate layers.
            lengths: (C,) valid samples. Families trained with an attention mask then ignore the
                padding; the others, and None, treat every frame as audio.

        Returns:
            (C, T, D) with T = num_frames(S), or with `all_layers` the L + 1 hidden states as
            transformers numbers them: 0 is the input of the first layer, L the encoder's output (so
            after a final normalisation, where there is one). Frames beyond num_frames(a clip's own
            length) are padding.
        """
        # A frozen encoder in a training step must not build a graph that nobody will use.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.run(features.to(self.dtype), lengths, all_layers)

    def run(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Call `encode`, and again in the backward pass if activations are not kept."""
        if self._recomputes and self.training:
            return checkpoint(self.encode, features, lengths, all_layers, use_reentrant=False)
        return self.encode(features, lengths, all_layers)

    def load_weights(self) -> None:
        """Load weights that come with a library into `model`; by default, an inline configuration has random ones."""

    @classmethod
    def brings_weights(cls) -> bool:
        """Whether an inline configuration gives trained weights."""
        return cls.load_weights is not AudioEncoder.load_weights

    @property
    def width(self) -> int:
        """D, channels per frame."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """L, transformer layers."""
        return int(self.config.num_hidden_layers)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def frozen(self) -> bool:
        """True when no weight is trained."""
        return not any(p.requires_grad for p in self.model.parameters())

    def train(self, mode: bool = True) -> "AudioEncoder":
        """Switch mode; a frozen encoder stays in eval, or dropout would randomise its features.

        Batch normalisation always uses its running statistics: those of a batch would make a clip's features depend on
        its neighbours, and differ from the ones the exported model computes.
        """
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def num_frames(self, samples: Samples) -> Samples:
        """Frames of clips of so many samples (an int, or a tensor of any shape); at least 1."""
        return count_frames(samples, self.frame_layers, self.chunk_samples)

    @property
    def chunk_samples(self) -> int:
        """Samples after which the layers of `frame_layers` begin anew; 0: never."""
        return 0

    @property
    def hop_samples(self) -> float:
        """Samples between two frames; the mean, if they come in chunks."""
        if self.chunk_samples:
            return self.chunk_samples / count_frames(self.chunk_samples, self.frame_layers)
        return prod(stride for _, stride, _ in self.frame_layers)

    @property
    def first_centre(self) -> float:
        """Sample in the middle of the first frame's receptive field; the others follow at equal distances."""
        centre, hop = 0.0, 1
        for kernel, stride, padding in self.frame_layers:
            # In samples: `hop` is the distance between two inputs of this layer.
            centre += ((kernel - 1) / 2 - padding) * hop
            hop *= stride
        return centre

    @property
    def min_samples(self) -> int:
        """Shortest clip it runs on; at least 25 ms, the window of the spectral front-ends."""
        samples = 1
        for kernel, stride, padding in reversed(self.frame_layers):
            samples = (samples - 1) * stride + kernel - 2 * padding
        return max(samples, 400)

    def pad_samples(self, samples: int, pad_audio: PadAudio) -> int:
        """The padded length of a batch whose longest clip has `samples` samples."""
        return max(samples, self.min_samples)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        if self.model.supports_gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self._recomputes = True
