"""The search for the largest micro-batch that fits: which sizes to try, and on what."""

from __future__ import annotations

import math

import numpy as np

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.micro_batch import MicroBatch

_CLIP_S = (2.5, 5.0, 10.0, 20.0, 30.0)
_SAFETY = 0.9  # routers may come to choose larger members than in the trials
# Fast speech has 3.5 words a second; answers to short clips are sentences too.
_WORDS_PER_S, _LEAST_WORDS, _INSTRUCTION_WORDS = 3.5, 30, 40
_WORDS = (
    *("the", "speaker", "says", "that", "rain", "fell", "over", "old", "town", "while", "a", "small", "dog", "barked"),
    *("at", "passing", "trains", "and", "somebody", "played", "piano", "behind", "an", "open", "window", "before"),
)


def clip_lengths(max_duration_s: float) -> list[float]:
    """Return the clip lengths to try, in seconds and rising; the last is `max_duration_s`."""
    return [seconds for seconds in _CLIP_S if seconds < max_duration_s] + [max_duration_s]


class Largest:
    """Finds the largest number in 1..most that fits, if every smaller one does: by doubling, then bisection.

    Attributes:
        number: What to try next, while `done` is false.
        found: The largest that fitted so far; 0 if none did.
    """

    def __init__(self, most: int, guess: int = 1):
        """Start from `guess`: the closer, the fewer trials."""
        assert most >= 1
        self._most, self.found, self._too_many = most, 0, most + 1
        self.number = min(max(guess, 1), most)

    @property
    def done(self) -> bool:
        """Whether nothing is left to try."""
        return self._too_many - self.found == 1

    def tell(self, fitted: bool) -> None:
        """Take in whether `number` fitted, and choose the next."""
        if fitted:
            self.found = self.number
        else:
            self._too_many = self.number
        doubled, middle = min(2 * self.found, self._most), (self.found + self._too_many) // 2
        self.number = doubled if self._too_many > self._most else middle


def synthetic_batch(clips: int, seconds: float) -> MicroBatch:
    """Return noise of the given length with texts as long as speech of that length can have."""
    samples = round(seconds * SAMPLE_RATE)
    random = np.random.default_rng(clips)
    answer = _text(max(_LEAST_WORDS, round(_WORDS_PER_S * seconds)))
    return MicroBatch(
        audio=random.integers(-8000, 8000, clips * samples, dtype=np.int16),
        lengths=[samples] * clips,
        scales=[2.0**-15] * clips,
        ids=[f"clip {n}" for n in range(clips)],
        instructions=[_text(_INSTRUCTION_WORDS)] * clips,
        answers=[answer] * clips,
        references=[[answer]] * clips,
        tasks=["asr"] * clips,
        sources=["synthetic"] * clips,
        bad=[],
    )


def synthetic_texts() -> list[str]:
    """Return texts a tokenizer can be trained on that is to read those of `synthetic_batch`."""
    return [_text(len(_WORDS))]


def recommended_batch_seconds(clips: dict[float, int], max_batch_size: int) -> float:
    """Return a value for data.batch_seconds under which every micro-batch of the plan fits.

    Args:
        clips: Most clips that fit, by their length in seconds; not empty, at least one for every length.
        max_batch_size: Largest number that was tried. Where it fits, memory sets no limit.

    Returns:
        0.9 of the smallest limit that memory sets, or of the most that was tried if it sets none. Never less than the
        longest clip, which data.batch_seconds has to hold.
    """
    limited = [seconds * number for seconds, number in clips.items() if number < max_batch_size]
    smallest = min(limited) if limited else max(clips) * clips[max(clips)]
    return max(math.floor(10 * _SAFETY * smallest) / 10, max(clips))


def _text(words: int) -> str:
    return " ".join(_WORDS[n % len(_WORDS)] for n in range(words))
