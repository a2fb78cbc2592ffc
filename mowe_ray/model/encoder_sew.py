"""SEW and SEW-D: Wav2Vec2 with a transformer on every second frame.

The frames are averaged in pairs before the transformer, and each of its outputs becomes two again.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, SEWDModel, SEWModel
from transformers.masking_utils import create_bidirectional_mask

from .encoder_base import ENCODERS
from .encoder_wav2vec2 import Wav2Vec2AudioEncoder, silent_behind


@ENCODERS.register("sew")
class SEWAudioEncoder(Wav2Vec2AudioEncoder):
    """SEW (arXiv 2109.06870); 50 frames per second, computed at 25.

    Padding does not change a clip's frames: they are those of the clip alone. [ours] transformers also lets a clip
    attend to a pair of which only one frame is its own. Hidden states hold each of their frames twice, so that all
    have one rate. [ours] The last frame of an odd number is zero, as in transformers.
    """

    model_class: ClassVar[type[PreTrainedModel]] = SEWModel
    model: Any

    @property
    def min_samples(self) -> int:
        """Shortest clip: frames enough for one of the transformer."""
        samples = int(self.config.squeeze_factor)
        for kernel, stride, _ in reversed(self.frame_layers):
            samples = (samples - 1) * stride + kernel
        return samples

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the modules of transformers, whose own forward has no mask of the pairs that are whole."""
        factor, pairs = self.config.squeeze_factor, None
        if lengths is not None:
            lengths = lengths.clamp(min=self.min_samples)
            pairs = self.num_frames(lengths) // factor
        self.mask_convolutions(lengths)
        hidden = self.embed(features).transpose(1, 2)
        if lengths is not None:
            hidden = silent_behind(hidden, self.num_frames(lengths))
        states = self.run_layers(self.squeeze(hidden), pairs, all_layers)
        wide = [state.repeat_interleave(factor, 1) for state in states[:-1]] + [self.model.encoder.upsample(states[-1])]
        wide = [F.pad(state, (0, 0, 0, hidden.shape[2] - state.shape[1])) for state in wide]
        if pairs is not None:
            wide = [silent_behind(state.transpose(1, 2), pairs * factor).transpose(1, 2) for state in wide]
        return tuple(wide) if all_layers else wide[-1]

    def embed(self, features: Tensor) -> Tensor:
        """Return the frames of the convolutions (C, T, D)."""
        model = self.model
        hidden = model.layer_norm(model.feature_extractor(features).transpose(1, 2))
        if model.project_features:
            hidden = model.feature_projection(hidden)
        projected: Tensor = model.feature_dropout(hidden)
        return projected

    def squeeze(self, hidden: Tensor) -> Tensor:
        """Return the means of pairs with their positions (C, P, D), of (C, D, T)."""
        encoder = self.model.encoder
        pooled = encoder.pool(hidden)
        placed: Tensor = pooled + encoder.pos_conv_embed(hidden)[..., : pooled.shape[-1]]
        return placed.transpose(1, 2)

    def run_layers(self, hidden: Tensor, own: Tensor | None, all_layers: bool) -> list[Tensor]:
        """Return the L + 1 states (C, P, D) of the transformer, or the last of them alone.

        Args:
            hidden: (C, P, D) means of pairs.
            own: (C,) pairs of each clip; None: all.
            all_layers: Keep the others.
        """
        encoder, mask = self.model.encoder, None
        if own is not None:
            valid = torch.arange(hidden.shape[1], device=hidden.device) < own[:, None]
            mask = create_bidirectional_mask(config=self.model.config, inputs_embeds=hidden, attention_mask=valid)
        states = [encoder.dropout(encoder.layer_norm(hidden))]
        for layer in encoder.layers:
            hidden = layer(states[-1], attention_mask=mask)
            states = [*states, hidden] if all_layers else [hidden]
        return states


@ENCODERS.register("sew-d")
class SEWDAudioEncoder(SEWAudioEncoder):
    """SEW-D: SEW with the disentangled attention of DeBERTa."""

    model_class = SEWDModel
    lora_targets = ("query_proj", "key_proj", "value_proj")

    def run_layers(self, hidden: Tensor, own: Tensor | None, all_layers: bool) -> list[Tensor]:
        """Return the states of the transformer, as `SEWAudioEncoder.run_layers`."""
        transformer = self.model.encoder.encoder
        pairs = torch.arange(hidden.shape[1], device=hidden.device)
        valid = torch.ones_like(pairs)[None] if own is None else (pairs < own[:, None]).long()
        options = {"relative_pos": transformer.get_rel_pos(hidden), "rel_embeddings": transformer.get_rel_embedding()}
        states = [hidden]
        for layer in transformer.layer:
            hidden = layer(states[-1], valid[:, None, None], **options)
            states = [*states, hidden] if all_layers else [hidden]
        return states
