"""Cuts of lhotse, against what lhotse itself loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from tests.read_source import read_source, write_lines

RATE = 16_000


@pytest.fixture
def cut(tmp_path: Path) -> Callable[..., Any]:
    """Make a cut of noise, in a file of its own, with a text."""
    from lhotse import Recording, SupervisionSegment

    def make(seed: int, seconds: float = 1.0, channels: int = 1, level: float = 0.1, text: str = "", rate: int = RATE):
        path = tmp_path / f"{seed}.wav"
        noise = level * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
        soundfile.write(path, noise, rate, subtype="PCM_16")
        recording = Recording.from_file(path)
        whole = recording.to_cut()
        spoken = text or f"word {seed}"
        whole.supervisions = [SupervisionSegment(f"s{seed}", recording.id, 0.0, recording.duration, text=spoken)]
        return whole

    return make


def loaded(folder: Path, cut: Any) -> tuple[np.ndarray, str]:
    """Return the samples and the answer that are made of a cut."""
    path = write_lines(folder / "cuts.jsonl", [cut.to_dict() | {"question": "What is said?"}])
    index = build_index([SourceSpec("s", str(path), "asr")], folder / "index", min_s=0.1, max_s=30.0)
    assert index.bad == []
    batch = load_micro_batch(index.table, 0.1, 30.0)
    assert batch.bad == []
    assert index.durations[0] == pytest.approx(batch.lengths[0] / RATE, abs=1 / RATE)
    return batch.clips()[0][0], batch.answers[0]


def same(found: np.ndarray, cut: Any) -> None:
    wanted = cut.load_audio().mean(0)
    assert len(found) == len(wanted)
    # int16 with a scale of its own: half a step of the largest sample.
    np.testing.assert_allclose(found, wanted / max(1.0, np.abs(wanted).max()), atol=np.abs(wanted).max() / 60_000)


CASES: dict[str, Callable[..., Any]] = {
    "appended": lambda cut: cut(1).append(cut(2, 0.7)),
    "appended_pieces": lambda cut: cut(1).truncate(offset=0.31, duration=0.42).append(cut(2).truncate(offset=0.5003)),
    "padded": lambda cut: cut(1).pad(duration=1.5),
    "padded_at_the_left": lambda cut: cut(1).pad(duration=1.5, direction="left"),
    "padded_at_both_ends_and_appended": lambda cut: cut(1).pad(duration=1.5, direction="both").append(cut(2, 0.4)),
    "mixed": lambda cut: cut(1).mix(cut(2, 0.5), offset_other_by=0.25),
    "mixed_at_10_dB": lambda cut: cut(1).mix(cut(2, 0.5, level=0.3), offset_other_by=0.25, snr=10),
    "mixed_at_minus_5_dB_after_padding": lambda cut: cut(1).pad(duration=1.5, direction="left").mix(cut(2), snr=-5),
    "mixed_beyond_the_end": lambda cut: cut(1).mix(cut(2), offset_other_by=0.6, snr=3),
    "mixed_of_odd_lengths": lambda cut: cut(1, 0.70003).mix(cut(2, 0.33331), offset_other_by=0.12347, snr=0),
    "mixed_louder_than_one": lambda cut: cut(1, level=0.4).mix(cut(2, level=0.4)),
    "mixed_and_truncated": lambda cut: (
        cut(1).mix(cut(2), offset_other_by=0.3, snr=3).truncate(offset=0.4, duration=0.5)
    ),
    "mixed_and_louder": lambda cut: cut(1).mix(cut(2), snr=3).perturb_volume(0.5),
    "louder": lambda cut: cut(1).perturb_volume(0.4),
    "all_channels": lambda cut: cut(1, channels=3),
    "a_mix_of_all_channels": lambda cut: cut(1, channels=2).mix(cut(2, 0.5), snr=6),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cut_is_what_lhotse_loads(tmp_path: Path, cut: Callable[..., Any], case: str) -> None:
    made = CASES[case](cut)
    found, answer = loaded(tmp_path, made)
    same(found, made)
    assert answer == " ".join(supervision.text for supervision in made.supervisions)


def test_one_channel_of_several(tmp_path: Path, cut: Callable[..., Any]) -> None:
    from lhotse import MonoCut

    whole = cut(1, channels=3)
    for channel in (0, 2):
        one = MonoCut("one", 0.2, 0.5, channel, whole.supervisions, recording=whole.recording)
        same(loaded(tmp_path, one)[0], one)


def test_a_mix_at_another_rate_is_resampled(tmp_path: Path, cut: Callable[..., Any]) -> None:
    """By another resampler than lhotse's, which differs at the highest frequencies."""
    tone = cut(1, rate=44_100)
    time = np.arange(44_100) / 44_100
    soundfile.write(tmp_path / "1.wav", 0.5 * np.sin(2 * np.pi * 440 * time), 44_100, subtype="PCM_16")
    mixed = tone.resample(RATE).append(cut(2, 0.4, level=1e-3))
    found, _ = loaded(tmp_path, mixed)
    assert len(found) == mixed.num_samples == round(1.4 * RATE)
    middle = slice(RATE // 10, RATE * 8 // 10)
    np.testing.assert_allclose(found[middle], mixed.load_audio()[0][middle], atol=2e-3)


def test_only_pieces_are_decoded_and_what_is_too_short_is_told(tmp_path: Path, cut: Callable[..., Any]) -> None:
    mixed = cut(1, 3.0).truncate(offset=2.0).append(cut(2))
    path = tmp_path / "1.wav"
    soundfile.write(path, soundfile.read(path)[0][: 2 * RATE + 100], RATE, subtype="PCM_16")
    read = read_source(write_lines(tmp_path / "cuts.jsonl", [mixed.to_dict()]), tmp_path / "index", "asr")
    assert [(bad.cause, bad.detail.partition(": ")[0]) for bad in read.bad] == [
        ("truncated", f"{path} has 0.01 s of 1.00 s")
    ]


@pytest.mark.parametrize(
    ("changed", "cause", "detail"),
    [
        (lambda cut: cut(1).perturb_speed(1.1), "unknown_audio", "'transforms' has Speed, which lhotse applies"),
        (lambda cut: cut(1).append(cut(2).perturb_tempo(0.9)), "unknown_audio", "'transforms' has Tempo"),
        (lambda cut: cut(1).append(cut(2)).reverb_rir(), "unknown_audio", "has ReverbWithImpulseResponse"),
    ],
)
def test_what_lhotse_would_make_is_refused(
    tmp_path: Path, cut: Callable[..., Any], changed: Callable[..., Any], cause: str, detail: str
) -> None:
    row = json.loads(json.dumps(changed(cut).to_dict()))
    read = read_source(write_lines(tmp_path / "cuts.jsonl", [row]), tmp_path / "index", "asr")
    assert [bad.cause for bad in read.bad] == [cause]
    assert detail in read.bad[0].detail
    assert "cuts.save_audios()" in read.bad[0].detail


def test_a_mix_of_what_may_not_be_read_is_refused(tmp_path: Path, cut: Callable[..., Any]) -> None:
    row = cut(1).append(cut(2)).to_dict()
    row["tracks"][1]["cut"]["recording"]["sources"][0]["source"] = "http://example.org/2.wav"
    read = read_source(write_lines(tmp_path / "cuts.jsonl", [row]), tmp_path / "index", "asr")
    assert [bad.cause for bad in read.bad] == ["not_allowed"]
