"""Front-ends against transformers' extractors, and the spectral ones against float64 by hand."""

import ast
import subprocess
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from mowe_ray.model.frontends import (
    FrontEnd,
    KaldiFbank,
    LogMel,
    NormalisedWave,
    front_end_from_dict,
    spec_augment,
)

SECOND = 16_000


def clip(samples: int, seed: int = 0) -> np.ndarray:
    """A chord with an offset in noise: something in every band, and a mean to remove."""
    random = np.random.default_rng(seed)
    time = np.arange(samples) / SECOND
    chord = sum(np.sin(2 * np.pi * hertz * time) for hertz in (120, 440, 3100))
    return (0.1 * chord + 0.02 * random.standard_normal(samples) + 0.01).astype(np.float32)


def features(front_end: FrontEnd, *clips: np.ndarray, padded: int) -> torch.Tensor:
    wave = torch.zeros(len(clips), max(map(len, clips)))
    for row, samples in zip(wave, clips, strict=True):
        row[: len(samples)] = torch.from_numpy(samples)
    return front_end(wave, torch.tensor([len(c) for c in clips]), padded)


# ---- log-mel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("seconds", [1.0, 12.34, 30.0])
def test_log_mel_equals_whispers_extractor_at_30_s(n_mels: int, seconds: float) -> None:
    wave = clip(round(seconds * SECOND))
    expected = WhisperFeatureExtractor(n_mels)(wave, sampling_rate=SECOND, return_tensors="pt")
    ours = features(LogMel(n_mels), wave, padded=30 * SECOND)
    torch.testing.assert_close(ours, expected.input_features, atol=1e-5, rtol=0)


def test_log_mel_equals_the_definition_in_float64() -> None:
    wave = clip(SECOND)
    padded = np.pad(wave.astype(np.float64), (200, 200 + SECOND // 4))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[i * 160 : i * 160 + 400] for i in range(125)])
    # torch reflects at the start; only the second half of the first two frames' padding is silent.
    frames[0, :200] = wave[200:0:-1]
    frames[1, :40] = wave[40:0:-1]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    log_mel = np.log10(np.maximum(power @ slaney_by_hand(80), 1e-10)).T
    expected = (np.maximum(log_mel, log_mel.max() - 8) + 4) / 4
    ours = features(LogMel(), wave, padded=SECOND * 5 // 4)[0]
    assert ours.shape == (80, 125)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)


def slaney_by_hand(n_mels: int) -> np.ndarray:
    """Triangles of equal area (201, n_mels); mel is linear in Hz below 1 kHz, then logarithmic."""
    top = 15 + np.log(8000 / 1000) * 27 / np.log(6.4)
    mels = np.linspace(0, top, n_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    hertz = np.arange(201)[:, None] * 40.0
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    return np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)


def test_log_mel_does_not_depend_on_padding_or_neighbours() -> None:
    """The floor is per clip, and 200 silent samples keep the last frame's own value."""
    short, loud = clip(3 * SECOND), 30 * clip(5 * SECOND, seed=1)
    alone = features(LogMel(), short, padded=3 * SECOND + 320)
    together = features(LogMel(), short, loud, padded=8 * SECOND)
    frames = short.size // 160
    torch.testing.assert_close(together[0, :, :frames], alone[0, :, :frames], atol=1e-6, rtol=0)


def test_front_ends_ignore_what_lies_beyond_a_clip() -> None:
    wave = torch.from_numpy(clip(SECOND))[None]
    dirty = torch.cat((wave, torch.ones(1, 5_000)), dim=1)
    length = torch.tensor([SECOND])
    for front_end in (LogMel(), NormalisedWave(), NormalisedWave(False), KaldiFbank()):
        expected = front_end(wave, length, 2 * SECOND)
        assert torch.equal(front_end(dirty, length, 2 * SECOND), expected)


def test_front_ends_compute_in_float32_outside_autocast() -> None:
    wave, length = torch.from_numpy(clip(SECOND))[None], torch.tensor([SECOND])
    for front_end in (LogMel(), NormalisedWave(), KaldiFbank()):
        expected = front_end(wave, length, SECOND)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = front_end(wave, length, SECOND)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, expected)


# ---- wave -------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_normalize", [True, False])
def test_wave_equals_wav2vec2s_extractor(do_normalize: bool) -> None:
    clips = [clip(SECOND), clip(7_000, seed=1)]
    extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=True)
    expected = extractor(clips, sampling_rate=SECOND, padding=True, return_tensors="pt")
    ours = features(NormalisedWave(do_normalize), *clips, padded=SECOND)
    torch.testing.assert_close(ours, expected.input_values, atol=1e-5, rtol=1e-5)


def test_wave_moments_are_those_of_the_clip_alone() -> None:
    ours = features(NormalisedWave(), clip(7_000), padded=SECOND)[0].double()
    assert abs(ours[:7_000].mean()) < 1e-6
    assert abs(ours[:7_000].var(correction=0) - 1) < 1e-4
    assert not ours[7_000:].any()


# ---- Kaldi filter bank ------------------------------------------------------------------------


@pytest.mark.parametrize("do_normalize", [True, False])
def test_fbank_equals_asts_extractor(do_normalize: bool) -> None:
    """Two clips of different length, compared over the extractor's fixed window."""
    clips = [clip(3 * SECOND), clip(10_000, seed=1)]
    extractor = ASTFeatureExtractor(max_length=400, do_normalize=do_normalize)
    expected = extractor(clips, sampling_rate=SECOND, return_tensors="pt").input_values
    padded = 400 + 399 * 160
    ours = features(KaldiFbank(do_normalize=do_normalize), *clips, padded=padded)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)
    assert (ours - expected).abs().mean() < 1e-5


def test_fbank_equals_the_definition_in_float64() -> None:
    wave = clip(4_000).astype(np.float64)
    frames = np.stack([wave[i : i + 400] for i in range(0, 3_601, 160)])
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate((frames[:, :1], frames[:, :-1]), axis=1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    power = np.abs(np.fft.rfft(frames * window, n=512)) ** 2
    mel = 1127 * np.log1p(np.arange(257) * 31.25 / 700)[:, None]
    edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(8000 / 700), 42)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bank = np.maximum(0, np.minimum((mel - low) / (centre - low), (high - mel) / (high - centre)))
    expected = np.log(np.maximum(power @ bank, np.finfo(np.float32).eps))
    ours = features(KaldiFbank(40, do_normalize=False), wave.astype(np.float32), padded=4_000)[0]
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-3)


# ---- values -----------------------------------------------------------------------------------


def test_equal_front_ends_are_one_key() -> None:
    assert LogMel(80) == LogMel(n_mels=80)
    assert len({LogMel(80), LogMel(), LogMel(128), NormalisedWave(), NormalisedWave(False)}) == 4


@pytest.mark.parametrize("front_end", [LogMel(128), NormalisedWave(False), KaldiFbank(64, mean=-1.0)])
def test_front_ends_survive_a_configuration_file(front_end: FrontEnd) -> None:
    assert front_end_from_dict(front_end.to_dict()) == front_end


def test_unknown_front_end_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'mfcc' is unknown; known are clap_log_mel, .*kaldi_fbank, .*log_mel, .*wave"
    ):
        front_end_from_dict({"kind": "mfcc"})


# ---- SpecAugment ------------------------------------------------------------------------------


def test_spec_augment_masks_whole_frames_of_the_clip_only() -> None:
    torch.manual_seed(0)
    valid = torch.tensor([500, 100, 19])
    masked = spec_augment(torch.ones(3, 8, 500), 0.3, 20, valid) == 0
    assert torch.equal(masked.all(1), masked.any(1))
    hidden = masked[:, 0].sum(1)
    assert not masked[1, :, 100:].any()
    assert hidden[2] == 0, "a clip shorter than one stretch stays whole"
    assert all(20 <= n <= share * 1.5 for n, share in zip(hidden[:2], (150, 40), strict=True))


def test_spec_augment_masks_about_the_asked_share_and_replays() -> None:
    ones = torch.ones(200, 1, 1000)
    torch.manual_seed(3)
    first = spec_augment(ones, 0.2, 10)
    torch.manual_seed(3)
    assert torch.equal(spec_augment(ones, 0.2, 10), first)
    # 20 stretches of 10 frames at random places cover 1 - (1 - 0.01)^20 = 18 % of the clip.
    assert 0.16 < (first == 0).float().mean() < 0.20


@dataclass(frozen=True)
class MatmulPrecision(FrontEnd):
    """Records how float32 matrices are multiplied where features are computed."""

    kind: ClassVar[str] = "matmul_precision"
    found: list[str] = field(default_factory=list, compare=False)

    def features(self, wave: Tensor, lengths: Tensor) -> Tensor:
        self.found.extend(b.matmul.fp32_precision for b in (torch.backends.cuda, torch.backends.mkldnn))
        return wave


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_features_are_computed_without_tf32(precision: str) -> None:
    front_end = MatmulPrecision()
    torch.set_float32_matmul_precision(precision)
    try:
        front_end(torch.zeros(1, 400), torch.tensor([400]), 400)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert front_end.found == ["ieee", "ieee"]


PRECISIONS = {
    "the older switch": "torch.backends.cuda.matmul.allow_tf32 = True",
    "the newer one of all backends": "torch.backends.fp32_precision = 'tf32'",
}
_WITH_PRECISION = """
import sys
import torch
from mowe_ray.model.frontends import KaldiFbank, LogMel

def state():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "contradictory"
    return older, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

class Recording(LogMel):
    def features(self, wave, lengths):
        found.append((state(), torch.backends.cuda.matmul.allow_tf32))
        if len(found) > 1:
            raise KeyError
        return super().features(wave, lengths)

found = []
wave, lengths = torch.randn(2, 16_000), torch.tensor([16_000, 9_000])
exact = [front_end(wave, lengths, 16_000) for front_end in (LogMel(), KaldiFbank())]
exec(sys.argv[1])
before = state()
features = [front_end(wave, lengths, 16_000) for front_end in (Recording(), KaldiFbank())]
assert all(torch.equal(a, b) for a, b in zip(exact, features))
assert state() == before, (before, state())
try:
    Recording()(wave, lengths, 16_000)
except KeyError:
    assert state() == before, (before, state())
print([*found, before])
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_front_end_leaves_the_switches_as_it_found_them(precision: str) -> None:
    """In a process of its own, because torch cannot always be set back. Inside, the switches do not contradict."""
    command = [sys.executable, "-W", "ignore", "-c", _WITH_PRECISION, PRECISIONS[precision]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *inside, before = ast.literal_eval(done.stdout)
    for (older, cuda, cpu), allows_tf32 in inside:
        assert (cuda, cpu) == ("ieee", "ieee")
        assert not allows_tf32
        assert older in ("highest", before[0])
