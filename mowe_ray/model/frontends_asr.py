"""Front-ends of speech recognisers: filter banks in the ways of fairseq, FunASR, LASR and Granite Speech.

Shapes: C clips, F feature frames, B mel bins.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from .frontends import FRONT_ENDS, SAMPLE_RATE, FrontEnd, kaldi_filters, kaldi_log_mel

_WINDOW, _HOP, _N_FFT = 400, 160, 512


def frames_of(lengths: Tensor) -> Tensor:
    """Return how many windows of 25 ms, one every 10 ms, lie wholly in clips of `lengths` (C,) samples."""
    return (lengths - _WINDOW).div(_HOP, rounding_mode="floor") + 1


def _own(features: Tensor, count: Tensor) -> Tensor:
    return (torch.arange(features.shape[1], device=features.device) < count[:, None])[..., None]


@FRONT_ENDS.register("cmvn_fbank")
@dataclass(frozen=True)
class CmvnFbank(FrontEnd):
    """Kaldi log filter banks (C, F, B) as `Speech2TextFeatureExtractor` makes them, one frame per 10 ms.

    Each band of a clip has, as asked for, zero mean and unit variance over the clip's own frames; the others hold 0.
    """

    kind: ClassVar[str] = "cmvn_fbank"
    n_mels: int = 80
    means: bool = True
    variances: bool = True

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Kaldi's features of 16-bit samples, normalised."""
        window = torch.hann_window(_WINDOW, periodic=False, dtype=torch.float64, device=wave.device) ** 0.85
        log_mel = kaldi_log_mel(wave.double() * 2**15, window, self.n_mels)
        count = frames_of(lengths).clamp(min=1)
        own, divisor = _own(log_mel, count), count[:, None, None]
        mean = (log_mel * own).sum(1, keepdim=True) / divisor
        deviation = ((log_mel - mean).square() * own).sum(1, keepdim=True).div(divisor).sqrt().clamp(min=1e-8)
        centred = log_mel - mean if self.means else log_mel
        return (centred / deviation if self.variances else centred).masked_fill(~own, 0).float()


@FRONT_ENDS.register("stacked_frames")
@dataclass(frozen=True)
class StackedFrames(FrontEnd):
    """Kaldi log filter banks, seven behind each other, as `FunAsrNanoFeatureExtractor` makes them (C, F / 6, 7 B).

    One for every sixth frame, with the three before and the three after it; the first and last one of a clip repeat.
    """

    kind: ClassVar[str] = "stacked_frames"
    n_mels: int = 80
    stacked: int = 7
    stride: int = 6

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Filter banks through a Hamming window, stacked."""
        window = torch.hamming_window(_WINDOW, periodic=False, dtype=torch.float64, device=wave.device)
        log_mel = kaldi_log_mel(wave.double(), window, self.n_mels).float()
        last = frames_of(lengths).clamp(min=1)[:, None, None] - 1
        centres = torch.arange(0, log_mel.shape[1], self.stride, device=wave.device)[:, None]
        taken = centres + torch.arange(self.stacked, device=wave.device) - (self.stacked - 1) // 2
        taken = torch.minimum(taken.clamp(min=0).expand(len(wave), -1, -1), last)
        clips = torch.arange(len(wave), device=wave.device)[:, None, None]
        stacks = log_mel[clips, taken].flatten(2)
        return stacks.masked_fill(~(centres <= last), 0)


@FRONT_ENDS.register("lasr_log_mel")
@dataclass(frozen=True)
class LasrLogMel(FrontEnd):
    """Log filter banks between 125 and 7,500 Hz (C, F, B) as `LasrFeatureExtractor` makes them, one per 10 ms."""

    kind: ClassVar[str] = "lasr_log_mel"
    n_mels: int = 128

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Hann window, power spectrum, log mel, in float64 as the extractor."""
        window = torch.hann_window(_WINDOW, periodic=False, dtype=torch.float64, device=wave.device)
        power = torch.fft.rfft(wave.double().unfold(1, _WINDOW, _HOP) * window, n=_N_FFT).abs() ** 2
        filters = kaldi_filters(self.n_mels, _N_FFT, wave.device, 125.0, 7500.0).double()
        log_mel: Tensor = (power @ filters).clamp(1e-5).log().float()
        return log_mel


@FRONT_ENDS.register("paired_log_mel")
@dataclass(frozen=True)
class PairedLogMel(FrontEnd):
    """Pairs of log-mel frames (C, F / 2, 2 B) as `GraniteSpeechFeatureExtractor` makes them of each clip alone.

    A clip is reflected at its own end, and its floor is 8 decades of power below its own maximum; frames behind it
    hold 0. [ours] The extractor makes both of the padded batch.
    """

    kind: ClassVar[str] = "paired_log_mel"
    n_mels: int = 80

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Power spectrum in windows around multiples of the hop, log mel, pairs."""
        reach = _N_FFT // 2
        time = torch.arange(-reach, wave.shape[1] + reach, device=wave.device).abs().expand(len(wave), -1)
        ends = lengths[:, None] - 1
        inside = torch.where(time > ends, 2 * ends - time, time)
        reflected = wave.gather(1, inside.clamp(min=0)).masked_fill(inside < 0, 0)
        window = torch.hann_window(_WINDOW, device=wave.device)
        spectrum = torch.stft(reflected, _N_FFT, _HOP, _WINDOW, window, center=False, return_complex=True)
        log_mel = (_htk_filters(self.n_mels, wave.device) @ spectrum.abs() ** 2).clamp(1e-10).log10().transpose(1, 2)
        own = _own(log_mel, lengths // _HOP + 1)
        loudest = log_mel.masked_fill(~own, -torch.inf).amax((1, 2), keepdim=True)
        scaled = (torch.maximum(log_mel, loudest - 8) / 4 + 1).masked_fill(~own, 0)
        pairs: Tensor = scaled[:, : scaled.shape[1] // 2 * 2].unflatten(1, (-1, 2)).flatten(2)
        return F.pad(pairs, (0, 0, 0, 1 if pairs.shape[1] == 0 else 0))


@lru_cache(maxsize=16)
def _htk_filters(n_mels: int, device: torch.device) -> Tensor:
    filters = mel_filter_bank(1 + _N_FFT // 2, n_mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm=None, mel_scale="htk")
    return torch.from_numpy(filters.T).to(device, torch.float32)
