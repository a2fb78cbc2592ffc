"""Questions about recordings: eleven tasks, each asked in several wordings, and what is right."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from music import PITCHES
from recordings import RATE, Recording, Wave

WORDINGS = {
    "asr": (
        "Write down what is said.",
        "Transcribe the recording.",
        "Which words does the speaker say?",
        "Type out the speech you hear.",
    ),
    "number": ("Which number is said?", "Write the spoken number in digits.", "What number do you hear?"),
    "letter": ("Which letter is said?", "Name the letter you hear.", "Which letter of the alphabet is spoken?"),
    "language": (
        "Which language is spoken?",
        "In what language does the person speak?",
        "Name the language of the speech.",
    ),
    "speaker": (
        "Is it the same person before and after the pause? Answer same or different.",
        "One speaker or two? Answer same or different.",
        "Do both parts come from the same voice? Answer same or different.",
    ),
    "event": ("What does this sound of a computer announce?", "Of what does the desktop tell with this sound?"),
    "sound": ("What makes this sound?", "What do you hear?", "Name the source of the sound."),
    "instrument": ("Which instrument plays?", "What instrument is it?", "Name the instrument you hear."),
    "pitch": (
        "Which pitch class is the note, in sharps?",
        "Name the note that is played, in sharps.",
        "What note is it, C to B, in sharps?",
    ),
    "interval": (
        "Is the second note higher or lower than the first?",
        "Does the pitch go up or down? Answer higher or lower.",
        "Compare the second note with the first: higher or lower?",
    ),
    "ac": ("Describe the audio.", "What happens in this recording?", "Give a short caption for the clip."),
}
_PLAYS = {"chord": "plays a chord", "up": "plays notes going up", "down": "plays notes going down"}


@dataclass(frozen=True)
class Question:
    """A clip, what is asked about it, and the right answers; `of` are the recordings it is made of."""

    task: str
    wave: Wave
    answers: tuple[str, ...]
    of: tuple[Recording, ...]

    def wording(self, seed: int) -> str:
        """Draw one of the task's wordings, by the recordings."""
        name = f"{seed} {self.task} {' '.join(recording.key for recording in self.of)}"
        return random.Random(name).choice(WORDINGS[self.task])


def questions(recordings: Sequence[Recording], seed: int, pairs_per_speaker: int = 60) -> Iterator[Question]:
    """Yield all questions about the recordings of one split, in a fixed order."""
    for recording in recordings:
        for task, answers in _about(recording):
            yield Question(task, recording.wave, answers, (recording,))
    yield from _speakers(recordings, random.Random(seed), pairs_per_speaker)


def _about(recording: Recording) -> Iterator[tuple[str, tuple[str, ...]]]:
    kind, text = recording.kind, recording.text
    if kind in ("number", "letter"):
        yield kind, (text,)
    if kind == "prompt" and text:
        yield "asr", (text,)
    if kind == "word" and recording.language == "English" and "_" not in text:  # else a name of the game is before it
        yield "asr", (text,)
    if recording.language and kind != "letter":
        yield "language", (recording.language,)
    if recording.voice and kind == "prompt":
        who, language = recording.voice, recording.language
        yield "ac", (f"A {who} speaks {language}.", f"A {who}'s voice says something in {language}.")
    if kind == "sound":
        yield "sound", (text,)
        yield "ac", (f"The sound of {text}.", f"{text.capitalize()} can be heard.")
    if kind == "event":
        yield "event", (text,)
    if kind == "music":
        yield from _about_music(recording)


def _about_music(recording: Recording) -> Iterator[tuple[str, tuple[str, ...]]]:
    instrument, _, what = recording.text.partition("|")
    if recording.unseen != "instrument":
        yield "instrument", (instrument,)
    if what in ("higher", "lower"):
        yield "interval", (what,)
    elif what.removeprefix("note ") in PITCHES:
        yield "pitch", (what.removeprefix("note "),)
    elif recording.unseen != "instrument":
        article = "An" if instrument[0] in "aeiou" else "A"
        yield "ac", (f"{article} {instrument} {_PLAYS[what]}.", f"{_PLAYS[what].capitalize()}: {article} {instrument}.")


def _speakers(recordings: Iterable[Recording], rng: random.Random, pairs: int) -> Iterator[Question]:
    """Join two short recordings with a pause: of one speaker, or of two in the same language where there are two."""
    short: dict[str, list[Recording]] = {}
    for recording in recordings:
        if recording.speaker and 0.3 * RATE < len(recording.wave) < 3 * RATE:
            short.setdefault(recording.speaker, []).append(recording)
    names = sorted(name for name, some in short.items() if len(some) > 3)
    spoken = {name: {recording.language for recording in short[name]} for name in names}
    for name in names if len(names) > 1 else ():
        for i in range(min(pairs, 2 * len(short[name]))):
            first = rng.choice(short[name])
            others = [speaker for speaker in names if speaker != name]
            other = name if i % 2 == 0 else rng.choice([s for s in others if spoken[s] & spoken[name]] or others)
            second = rng.choice([r for r in short[other] if r.key != first.key])
            pause = np.zeros(int(0.4 * RATE), np.float32)
            wave = np.concatenate([levelled(first.wave), pause, levelled(second.wave)])
            yield Question("speaker", wave, ("same" if other == name else "different",), (first, second))


def levelled(wave: Wave, peak: float = 0.5) -> Wave:
    """Scale to a peak: loudness must not tell recordings apart."""
    return wave * np.float32(peak / max(1e-6, float(np.abs(wave).max(initial=0.0))))


def telephone(wave: Wave) -> Wave:
    """Return what a telephone leaves: 300 to 3,400 Hz, in steps of the mu law."""
    spectrum = np.fft.rfft(wave)
    hertz = np.fft.rfftfreq(len(wave), 1 / RATE)
    spectrum[(hertz < 300) | (hertz > 3_400)] = 0
    narrow = np.fft.irfft(spectrum, len(wave)) / max(1e-6, float(np.abs(wave).max(initial=0.0)))
    coded = np.round(127 * np.sign(narrow) * np.log1p(255 * np.minimum(1, np.abs(narrow))) / np.log(256)) / 127
    return (0.5 * np.sign(coded) * np.expm1(np.abs(coded) * np.log(256)) / 255).astype(np.float32)


def noisy(wave: Wave, snr_db: float, rng: np.random.Generator) -> Wave:
    """Add pink noise at a ratio of the clip's power to the noise's, in decibels."""
    spectrum = rng.standard_normal(len(wave) // 2 + 1) + 1j * rng.standard_normal(len(wave) // 2 + 1)
    noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), len(wave))
    wanted = np.sqrt(np.mean(wave**2) / max(1e-12, np.mean(noise**2)) / 10 ** (snr_db / 10))
    return levelled((wave + wanted * noise).astype(np.float32))


def varied(wave: Wave, rng: np.random.Generator) -> Wave:
    """Return another take for training: with soft noise, and quieter or louder."""
    return noisy(wave, float(rng.uniform(20, 40)), rng) * np.float32(rng.uniform(0.4, 1.6))
