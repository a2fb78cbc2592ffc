"""The audio half of CLAP: HTSAT, a Swin transformer over windows of 10 s."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ClapAudioModel, PretrainedConfig
from transformers.audio_utils import mel_filter_bank

from .encoder_base import ENCODERS, AudioEncoder, PadAudio
from .frontends import FRONT_ENDS, SAMPLE_RATE, FrontEnd, resample

WINDOW_S = 10
"""Length of a window of CLAP, in seconds."""
_RATE = 48_000


@FRONT_ENDS.register("clap_log_mel")
@dataclass(frozen=True)
class ClapLogMel(FrontEnd):
    """Mel spectrograms in dB (C, windows of 10 s, F, B), as `ClapFeatureExtractor` makes them of waves at 48 kHz.

    A window that a clip does not fill holds the clip's part of it as often as it fits, and then silence: so it does not
    depend on the batch. Of longer clips the extractor takes 10 s at random; here they are cut into windows. [ours]
    """

    kind: ClassVar[str] = "clap_log_mel"
    n_mels: int = 64
    n_fft: int = 1024
    hop_length: int = 480
    lowest: float = 0
    highest: float = 14_000
    slaney: bool = True

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Power spectrum, mel bands, decibels."""
        waves = _repeated(resample(wave, _RATE), lengths * (_RATE // SAMPLE_RATE), WINDOW_S * _RATE).double()
        window = torch.hann_window(self.n_fft, dtype=torch.float64, device=wave.device)
        # In float64, as the extractor: above 8 kHz there is next to nothing, of which decibels show every digit.
        spectrum = torch.stft(waves.flatten(0, 1), self.n_fft, self.hop_length, window=window, return_complex=True)
        bands = (self.n_mels, self.n_fft, self.lowest, self.highest, self.slaney)
        mel = (_filters(*bands, wave.device) @ (spectrum.abs() ** 2)).transpose(1, 2)
        decibels: Tensor = (10 * mel.clamp(1e-10).log10()).float().unflatten(0, waves.shape[:2])
        return decibels


@ENCODERS.register("clap_audio_model")
class ClapAudioEncoder(AudioEncoder):
    """CLAP's audio tower as a frame encoder: its last grid of patches, averaged over frequency; 3.2 per second.

    The stages of the network have different widths: its hidden states here are those of the last stage alone. [ours]
    Of checkpoints with feature fusion, the path of clips up to 10 s is used. The wave has 16 kHz: the
    bands above 8 kHz, which CLAP was trained with, are empty.
    """

    sample_rate = _RATE
    model_class = ClapAudioModel
    key_mapping = MappingProxyType({r"^(clap\.)?audio_model\.": ""})
    lora_targets = ("query", "key", "value")

    @staticmethod
    def quiet(config: PretrainedConfig) -> PretrainedConfig:
        """A copy without random paths, and without the weights that only longer clips would use."""
        config = AudioEncoder.quiet(config)
        config.drop_path_rate = 0.0
        config.enable_fusion = False
        return config

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """Mel bands of torchaudio where the checkpoint fuses, of librosa where it does not, as the extractor has it."""
        fusion = getattr(config, "enable_fusion", False)
        return ClapLogMel(
            n_mels=config.num_mel_bins,
            n_fft=preprocessor.get("fft_window_size", ClapLogMel.n_fft),
            hop_length=preprocessor.get("hop_length", ClapLogMel.hop_length),
            lowest=preprocessor.get("frequency_min", ClapLogMel.lowest),
            highest=preprocessor.get("frequency_max", ClapLogMel.highest),
            slaney=preprocessor.get("truncation", "fusion" if fusion else "rand_trunc") != "fusion",
        )

    @property
    def width(self) -> int:
        """D, channels of the last stage."""
        return int(self.config.patch_embeds_hidden_size * 2 ** (len(self.config.depths) - 1))

    @property
    def num_layers(self) -> int:
        """L, blocks of the last stage."""
        return int(self.config.depths[-1])

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Columns of the last grid, of which each row of the folded spectrogram has its own."""
        encoder: Any = self.model.audio_encoder
        hop = WINDOW_S * SAMPLE_RATE // (encoder.input_resolutions[-1][1] * encoder.freq_ratio)
        return [(hop, hop, 0)]

    def pad_samples(self, samples: int, pad_audio: PadAudio) -> int:
        """Whole windows."""
        window = WINDOW_S * SAMPLE_RATE
        return -(-samples // window) * window

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the modules of transformers; windows hold no padding, so there is no mask."""
        encoder: Any = self.model.audio_encoder
        clips, windows = features.shape[:2]
        image = encoder.batch_norm(features.flatten(0, 1)[:, None].transpose(1, 3)).transpose(1, 3)
        hidden = encoder.patch_embed(encoder.reshape_mel2img(image))
        *stages, last_stage = encoder.layers
        for stage, resolution in zip(stages, encoder.input_resolutions, strict=False):
            hidden = stage(hidden, resolution)[0]
        rows, columns = encoder.input_resolutions[-1]

        def as_frames(patches: Tensor) -> Tensor:
            # The image holds the spectrogram in `freq_ratio` pieces, one below the other.
            grid: Tensor = patches.unflatten(1, (encoder.freq_ratio, rows // encoder.freq_ratio, columns))
            return grid.mean(2).reshape(clips, windows * encoder.freq_ratio * columns, -1)

        states = [hidden]
        for block in last_stage.blocks:
            states.append(block(states[-1], (rows, columns))[0])
        last = as_frames(encoder.norm(states[-1]))
        return (*map(as_frames, states[:-1]), last) if all_layers else last


def _repeated(wave: Tensor, lengths: Tensor, window: int) -> Tensor:
    """Return windows (C, W, window) of waves (C, S), in which a clip's own samples repeat while they fit."""
    count = max(1, -(-wave.shape[1] // window))
    padded = F.pad(wave, (0, count * window - wave.shape[1])).unflatten(1, (count, window))
    time = torch.arange(window, device=wave.device)
    filled = []
    for number in range(count):
        own = (lengths[:, None] - number * window).clamp(0, window)
        copies = padded[:, number].gather(1, time % own.clamp(min=1))
        filled.append(copies.masked_fill(time >= window // own.clamp(min=1) * own, 0))
    return torch.stack(filled, 1)


@lru_cache(maxsize=16)
def _filters(n_mels: int, n_fft: int, lowest: float, highest: float, slaney: bool, device: torch.device) -> Tensor:
    scale = "slaney" if slaney else "htk"
    norm = "slaney" if slaney else None
    filters = mel_filter_bank(1 + n_fft // 2, n_mels, lowest, highest, _RATE, norm=norm, mel_scale=scale)
    return torch.from_numpy(filters.T).to(device)
