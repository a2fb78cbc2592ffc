"""Front-ends: input features of an encoder (log-mel, waveform, filter bank), computed on its device.

Data workers ship plain 16 kHz waves; features are made here, next to the encoder, because they are
cheap on an accelerator and because the pool members that need them are only known after routing.
A front-end is a value: two encoders whose front-ends compare equal share one computation.

Shapes: C clips, S samples, F feature frames, B mel bins.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from math import ceil, gcd
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from .registry import Registry

SAMPLE_RATE = 16_000
"""Hz. Every wave inside the model has this rate."""

Samples = TypeVar("Samples", int, Tensor)

_ZERO_CROSSINGS = 6
# Samples of a frame, between frames, and of its Fourier transform, in Kaldi's and NeMo's front-ends.
_WINDOW, _HOP, _KALDI_FFT = 400, 160, 512


FRONT_ENDS: Registry[type["FrontEnd"]] = Registry("front_end.kind")
"""Class by the kind that a model's configuration names; plugins may add theirs."""


@dataclass(frozen=True)
class FrontEnd(ABC):
    """Turns padded waves into the features of one kind of encoder."""

    kind: ClassVar[str]

    def __call__(self, wave: Tensor, lengths: Tensor, padded_samples: int) -> Tensor:
        """Features of a batch, in float32 with all its bits, outside autocast and without a graph.

        Args:
            wave: (C, S) mono 16 kHz; whatever lies beyond a clip's own length is ignored.
            lengths: (C,) valid samples of each clip.
            padded_samples: the common length all clips get, filled with silence.
        """
        with torch.no_grad(), _without_autocast(wave.device), _without_tf32():
            wave = F.pad(wave.float(), (0, padded_samples - wave.shape[1]))
            valid = torch.arange(padded_samples, device=wave.device) < lengths[:, None]
            return self.features(wave.masked_fill(~valid, 0.0), lengths)

    @abstractmethod
    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Features of waves (C, padded samples) that are silent beyond their lengths (C,)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a configuration file; `front_end_from_dict` reads them back."""
        return {"kind": self.kind, **asdict(self)}


@FRONT_ENDS.register("log_mel")
@dataclass(frozen=True)
class LogMel(FrontEnd):
    """Whisper's log-mel spectrogram (C, B, F), F = padded samples // hop.

    Equal to `WhisperFeatureExtractor` at every padded length: its reflection at the end of the
    wave, its dropped last frame, its floor 8 decades of power (80 dB) below each clip's maximum.
    """

    kind: ClassVar[str] = "log_mel"
    n_mels: int = 80
    n_fft: int = 400
    hop_length: int = 160
    loudest: float | None = None
    """Decade that the floor is below, if it is not the clip's own maximum."""

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Log-mel energies, scaled as Whisper was trained on them."""
        window = torch.hann_window(self.n_fft, device=wave.device)
        # In float32, as `FrontEnd` ensures: powers of quiet clips underflow in half precision.
        spectrum = torch.stft(wave, self.n_fft, self.hop_length, window=window, return_complex=True)
        # The contiguous copy is measurably cheaper than a matmul on the strided view.
        power = (spectrum[..., :-1].abs() ** 2).contiguous()
        log_mel = (_slaney_filters(self.n_mels, self.n_fft, wave.device) @ power).clamp(1e-10).log10()
        if self.loudest is not None:
            return (log_mel.clamp(self.loudest - 8.0) + 4.0) / 4.0
        loudest = log_mel.amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0


@FRONT_ENDS.register("wave")
@dataclass(frozen=True)
class NormalisedWave(FrontEnd):
    """The wave itself (C, S), each clip with zero mean and unit variance if `do_normalize`.

    Equal to `Wav2Vec2FeatureExtractor` on every clip alone: the moments are those of the clip's own
    samples, never of its padding.
    """

    kind: ClassVar[str] = "wave"
    do_normalize: bool = True

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """The wave, silent beyond each clip's length."""
        if not self.do_normalize:
            return wave
        count = lengths[:, None].to(wave.dtype)
        valid = torch.arange(wave.shape[1], device=wave.device) < lengths[:, None]
        centred = (wave - wave.sum(1, keepdim=True) / count).masked_fill(~valid, 0.0)
        variance = centred.square().sum(1, keepdim=True) / count
        return centred / (variance + 1e-7).sqrt()


@FRONT_ENDS.register("raw_wave")
@dataclass(frozen=True)
class RawWave(FrontEnd):
    """The wave itself at another rate: (C, S * sample_rate / 16000), rounded up."""

    kind: ClassVar[str] = "raw_wave"
    sample_rate: int = SAMPLE_RATE

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """The wave, resampled."""
        return resample(wave, self.sample_rate)


@FRONT_ENDS.register("kaldi_fbank")
@dataclass(frozen=True)
class KaldiFbank(FrontEnd):
    """Kaldi log filter banks (C, F, B) as `ASTFeatureExtractor` makes them, one frame per 10 ms.

    Frames that do not lie wholly inside a clip hold `padding`, the value the extractor gives to
    the frames it appends.
    """

    kind: ClassVar[str] = "kaldi_fbank"
    n_mels: int = 128
    do_normalize: bool = True
    mean: float = -4.2677393
    std: float = 4.5689974

    window: ClassVar[int] = 400
    hop: ClassVar[int] = 160

    @property
    def padding(self) -> float:
        """Value of a padding frame: the extractor pads with 0 first and normalises afterwards."""
        return -self.mean / (2 * self.std) if self.do_normalize else 0.0

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Per frame: remove DC, pre-emphasise by 0.97, Hann window, power spectrum, log mel."""
        log_mel = kaldi_log_mel(wave, torch.hann_window(_WINDOW, periodic=False, device=wave.device), self.n_mels)
        own_frames = (lengths - self.window).div(self.hop, rounding_mode="floor") + 1
        valid = torch.arange(log_mel.shape[1], device=wave.device) < own_frames[:, None]
        if self.do_normalize:
            # Twice the deviation, as AST was trained (arXiv 2104.01778): a standard deviation of 0.5.
            log_mel = (log_mel - self.mean) / (2 * self.std)
        return log_mel.masked_fill(~valid[..., None], self.padding)


@FRONT_ENDS.register("stacked_fbank")
@dataclass(frozen=True)
class StackedFbank(FrontEnd):
    """Pairs of Kaldi log filter banks (C, F / 2, 2 B) as `SeamlessM4TFeatureExtractor` makes them, one per 20 ms.

    Each band of a clip has zero mean and unit variance over the clip's own frames; the others hold 0.
    """

    kind: ClassVar[str] = "stacked_fbank"
    n_mels: int = 80

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Kaldi's features of 16-bit samples, with its own (Povey's) window."""
        # In float64 up to the logarithm, as the extractor: what is rounded before is divided by small deviations.
        window = torch.hann_window(_WINDOW, periodic=False, dtype=torch.float64, device=wave.device) ** 0.85
        log_mel = kaldi_log_mel(wave.double() * 2**15, window, self.n_mels).float()
        own_frames = (lengths - _WINDOW).div(_HOP, rounding_mode="floor") + 1
        normalised = _normalise_bands(log_mel, own_frames, lambda variance: (variance + 1e-7).sqrt())
        pairs: Tensor = normalised[:, : normalised.shape[1] // 2 * 2].unflatten(1, (-1, 2)).flatten(2)
        return pairs


@FRONT_ENDS.register("nemo_log_mel")
@dataclass(frozen=True)
class NemoLogMel(FrontEnd):
    """NeMo's log-mel spectrogram (C, F, B) as `ParakeetFeatureExtractor` makes it, one frame per 10 ms.

    Each band of a clip has zero mean and unit variance over the clip's own frames; the others hold 0.
    """

    kind: ClassVar[str] = "nemo_log_mel"
    n_mels: int = 80

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Pre-emphasis by 0.97, power spectrum, log mel."""
        valid = torch.arange(wave.shape[1], device=wave.device) < lengths[:, None]
        wave = torch.cat((wave[:, :1], wave[:, 1:] - 0.97 * wave[:, :-1]), dim=1).masked_fill(~valid, 0.0)
        window = torch.hann_window(_WINDOW, periodic=False, device=wave.device)
        spectrum = torch.stft(wave, _KALDI_FFT, _HOP, _WINDOW, window=window, pad_mode="constant", return_complex=True)
        mel = _slaney_filters(self.n_mels, _KALDI_FFT, wave.device) @ (spectrum[..., :-1].abs() ** 2)
        return _normalise_bands((mel + 2**-24).log().transpose(1, 2), lengths // _HOP, lambda var: var.sqrt() + 1e-5)


def front_end_from_dict(values: Mapping[str, Any]) -> FrontEnd:
    """Rebuild a front-end from `FrontEnd.to_dict()`.

    Raises:
        ValueError: `kind` is not a known front-end.
    """
    fields = dict(values)
    return FRONT_ENDS.find(fields.pop("kind", None))(**fields)


def count_frames(samples: Samples, layers: Iterable[Sequence[int]], chunk_samples: int = 0) -> Samples:
    """Return how many frames layers in time make of so many samples; at least 1.

    Args:
        samples: An int, or a tensor of any shape.
        layers: (kernel, stride, padding) of each.
        chunk_samples: Samples after which they begin anew; 0: never.
    """
    before = samples * 0
    if chunk_samples:
        before = samples // chunk_samples * count_frames(chunk_samples, layers)
        samples = samples % chunk_samples
    for kernel, stride, padding in layers:
        samples = (samples + (2 * padding - kernel)) // stride + 1
    frames = samples + before
    return frames.clamp(min=1) if isinstance(frames, Tensor) else max(1, frames)


def resample(wave: Tensor, rate: int) -> Tensor:
    """Return waves (C, S) of 16 kHz at another rate, (C, ceil(S * rate / 16000)).

    A sinc low-pass below the lower of both Nyquist frequencies, Hann-windowed over `_ZERO_CROSSINGS` of its zeros on
    either side: the formula of `torchaudio.functional.resample`, which exports must not need.
    """
    if rate == SAMPLE_RATE:
        return wave
    divisor = gcd(rate, SAMPLE_RATE)
    before, after = SAMPLE_RATE // divisor, rate // divisor
    cutoff = min(before, after) * 0.99
    reach = ceil(_ZERO_CROSSINGS * before / cutoff)
    # In float64: phases of long filters lose digits that are heard.
    time = torch.arange(-reach, reach + before, dtype=torch.float64, device=wave.device) / before
    shift = torch.arange(0, -after, -1, dtype=torch.float64, device=wave.device) / after
    phase = ((time + shift[:, None]) * cutoff).clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(phase * torch.pi / (2 * _ZERO_CROSSINGS)).square()
    filters = (torch.sinc(phase) * window * cutoff / before).to(wave.dtype)
    samples = wave.shape[1]
    padded = F.pad(wave, (reach, reach + before))
    resampled = F.conv1d(padded[:, None], filters[:, None], stride=before).transpose(1, 2).flatten(1)
    return resampled[:, : -(-samples * after // before)]


def spec_augment(features: Tensor, mask_prob: float, mask_length: int, valid_frames: Tensor | None = None) -> Tensor:
    """Silence random stretches of time in a log-mel spectrogram (SpecAugment, arXiv 1904.08779).

    As transformers does for Whisper: per clip `mask_prob * frames / mask_length` stretches (rounded
    at random, at least 2) of `mask_length` frames become 0. [ours] Stretches may overlap, and are
    drawn with torch on the features' device, so that restoring its generator replays the masks.

    Args:
        features: (C, B, F) log-mel.
        mask_prob: share of the frames to mask, before overlaps.
        mask_length: frames (10 ms) per stretch.
        valid_frames: (C,) frames that belong to each clip; None means all of them.
    """
    clips, _, frames = features.shape
    device = features.device
    valid = torch.full((clips,), frames, device=device) if valid_frames is None else valid_frames
    most = max(2, int(mask_prob * frames / mask_length) + 1)
    # Rounded up or down with the probability of its fraction, so that the mean is exact.
    wanted = (mask_prob * valid / mask_length + torch.rand(clips, device=device)).floor().clamp(min=2)
    last_start = valid - mask_length
    # A clip shorter than one stretch is left alone: masking it would leave no signal.
    wanted = wanted.masked_fill(last_start < 0, 0)
    draws = torch.rand(clips, most, device=device)
    start = (draws * (last_start[:, None] + 1)).floor()
    used = torch.arange(most, device=device) < wanted[:, None]
    time = torch.arange(frames, device=device)[None, None, :]
    inside = (time >= start[..., None]) & (time < start[..., None] + mask_length)
    return features.masked_fill((inside & used[..., None]).any(1)[:, None, :], 0.0)


def _without_autocast(device: torch.device) -> torch.autocast:
    # Shape-only tensors have no autocast of their own.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Multiply float32 matrices in float32, where a program has allowed TF32 or bfloat16 instead (10 and 7 bits)."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program uses the newer switches alone: torch refuses to compare them with the older
        older = None
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")  # or parts of torch would refuse switches that contradict
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def kaldi_log_mel(wave: Tensor, window: Tensor, n_mels: int) -> Tensor:
    """Return log filter banks (C, F, B): remove DC, pre-emphasise by 0.97, window, power spectrum, log mel."""
    frames = wave.unfold(1, _WINDOW, _HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
    spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=_KALDI_FFT)
    energies = spectrum.abs() ** 2 @ kaldi_filters(n_mels, _KALDI_FFT, wave.device).to(wave.dtype)
    log_mel: Tensor = energies.clamp(torch.finfo(torch.float32).eps).log()
    return log_mel


def _normalise_bands(features: Tensor, own: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """Centre (C, F, B) over each clip's first `own` (C,) frames, divide by `scale` of the variance; the rest is 0."""
    mask = (torch.arange(features.shape[1], device=features.device) < own[:, None])[..., None]
    count = own.clamp(min=1)[:, None, None].to(features.dtype)
    centred = (features - (features * mask).sum(1, keepdim=True) / count) * mask
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / scale(variance)


@lru_cache(maxsize=16)
def _slaney_filters(n_mels: int, n_fft: int, device: torch.device) -> Tensor:
    filters = mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=n_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters.T).to(device, torch.float32)


@lru_cache(maxsize=16)
def kaldi_filters(
    n_mels: int, n_fft: int, device: torch.device, lowest: float = 20.0, highest: float = SAMPLE_RATE / 2
) -> Tensor:
    """Return Kaldi's triangular mel filters (n_fft / 2 + 1, B) between two frequencies in Hz."""

    # Written out because transformers warns about the empty lowest bands that AST was trained with.
    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    # On the CPU whatever the default device is: `estimate` builds models where it is "meta".
    spaced = partial(torch.linspace, dtype=torch.float64, device="cpu")
    bins = mel(spaced(0, SAMPLE_RATE / 2, 1 + n_fft // 2))[:, None]
    ends = mel(torch.tensor([lowest, highest], dtype=torch.float64, device="cpu")).tolist()
    edges = spaced(*ends, n_mels + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return torch.minimum(rise, fall).clamp(min=0).to(device, torch.float32)
