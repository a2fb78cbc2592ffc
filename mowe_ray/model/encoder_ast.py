"""Audio Spectrogram Transformer: patches of a filter bank, here as a sequence of frames."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import ASTModel, PretrainedConfig

from .encoder_base import ENCODERS, AudioEncoder
from .frontends import FrontEnd, KaldiFbank


@ENCODERS.register("audio-spectrogram-transformer")
class ASTAudioEncoder(AudioEncoder):
    """AST as a frame encoder: patches are averaged over frequency, one frame per patch column.

    AST sees a fixed window (10.24 s). Longer clips are cut into windows that overlap by just what
    the patches overlap, so that frames stay evenly spaced (100 ms) across the cuts. [ours]
    """

    sees_padding = True
    model_class = ASTModel
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    front_end: KaldiFbank

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """Kaldi filter banks with the statistics the checkpoint was trained with."""
        return KaldiFbank(
            n_mels=config.num_mel_bins,
            do_normalize=preprocessor.get("do_normalize", KaldiFbank.do_normalize),
            mean=preprocessor.get("mean", KaldiFbank.mean),
            std=preprocessor.get("std", KaldiFbank.std),
        )

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Filter-bank frames, then patches along time."""
        patches = (self.config.patch_size, self.config.time_stride, 0)
        return [(self.front_end.window, self.front_end.hop, 0), patches]

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """AST has no mask: like its own extractor, it treats padding frames as audio."""
        config = self.config
        clips, frames, mels = features.shape
        columns = (config.max_length - config.patch_size) // config.time_stride + 1
        shift = columns * config.time_stride
        windows = 1 + max(0, -(-(frames - config.max_length) // shift))
        missing = (windows - 1) * shift + config.max_length - frames
        features = F.pad(features, (0, 0, 0, missing), value=self.front_end.padding)
        windowed = features.unfold(1, config.max_length, shift).transpose(2, 3)
        output = self.model(
            windowed.reshape(clips * windows, config.max_length, mels),
            output_hidden_states=all_layers,
        )
        wanted = max(1, (frames - config.patch_size) // config.time_stride + 1)

        def as_frames(hidden: Tensor) -> Tensor:
            patches = hidden[:, 2:]  # behind the two class tokens
            per_window: Tensor = patches.unflatten(1, (-1, columns)).mean(1)
            return per_window.reshape(clips, windows * columns, -1)[:, :wanted]

        last = as_frames(output.last_hidden_state)
        if not all_layers:
            return last
        return (*(as_frames(hidden) for hidden in output.hidden_states[:-1]), last)
