"""The five tasks of the built-in corpus, each a function from a `Studio` to one `SyntheticExample`.

Small closed vocabularies on purpose: a randomly initialised model of a million parameters has to
learn all five tasks from some hundred clips. Every task balances its answers, so that guessing the
commonest one earns little.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mowe_ray.data.synthetic_corpus.sounds import SOUNDS, Rng, Wave, beeps, record
from mowe_ray.data.synthetic_corpus.speech import Prosody, Speaker

COLOURS = ("green", "blue", "yellow", "purple")
ANIMALS = ("cat", "horse", "fish", "monkey")
WORDS = COLOURS + ANIMALS
PHRASES = ("it is on the table", "we leave at noon", "she is in the garden", "the train is here")
CAPTIONS = {
    "siren": "a siren",
    "knocking": "knocking",
    "bell": "a bell",
    "rain": "rain",
    "dog": "a dog barking",
    "engine": "an engine",
}
COUNTS = ("one", "two", "three", "four")


ORDINARY = Prosody()


@dataclass(frozen=True)
class Emotion:
    """A way of speaking: prosody, loudness, and how much the voice is driven into distortion."""

    prosody: Prosody
    loudness: float
    drive: float = 0.0


EMOTIONS = {
    "happy": Emotion(Prosody(rate=205, pitch=85, span=99), loudness=1.2),
    "sad": Emotion(Prosody(rate=105, pitch=20, span=10), loudness=0.4),
    "angry": Emotion(Prosody(rate=230, pitch=40, span=60, volume=160), loudness=1.8, drive=6.0),
    "neutral": Emotion(Prosody(rate=155, pitch=50, span=30), loudness=0.8),
}

INSTRUCTIONS = {
    "asr": (
        "Write down what is said.",
        "Transcribe the speech.",
        "Which words do you hear?",
    ),
    "er": tuple(
        f"{question} ({', '.join(EMOTIONS)})"
        for question in (
            "How does the speaker feel?",
            "What is the emotion of the speaker?",
            "Which emotion is in this voice?",
        )
    ),
    "ac": (
        "Describe the sounds.",
        "Write a caption for this audio.",
        "What can be heard?",
    ),
}

Option = TypeVar("Option")


@dataclass(frozen=True)
class SyntheticExample:
    """One example before encoding: wave (S,) float32 at 16 kHz, and its two texts."""

    wave: Wave
    instruction: str
    answer: str


@dataclass(frozen=True)
class Studio:
    """What a task needs for its `number`-th clip.

    Attributes:
        number: position of the clip among those of its task.
        seeds: identify the corpus and the task; balanced choices depend on nothing else.
        rng: this clip's own random numbers.
        speaker: the synthesiser.
        voices: espeak-ng voices that may speak.
    """

    number: int
    seeds: tuple[int, ...]
    rng: Rng
    speaker: Speaker
    voices: Sequence[str]

    def any(self, options: Sequence[Option]) -> Option:
        """One of `options` at random."""
        return options[int(self.rng.integers(len(options)))]

    def balanced(self, options: Sequence[Option], turn: int) -> Option:
        """The `turn`-th of an endless sequence of shuffled decks, each with every option once."""
        block, place = divmod(turn, len(options))
        order = np.random.default_rng([*self.seeds, block]).permutation(len(options))
        return options[int(order[place])]

    def say(self, text: str, base: Prosody = ORDINARY, voice: str | None = None) -> Wave:
        """Speak in some voice, a little off the given prosody."""
        prosody = Prosody(
            rate=round(base.rate * self.rng.uniform(0.93, 1.07)),
            pitch=int(np.clip(base.pitch + self.rng.integers(-7, 8), 0, 99)),
            span=int(np.clip(base.span + self.rng.integers(-8, 9), 0, 99)),
            volume=base.volume,
        )
        return self.speaker.say(text, voice or self.any(self.voices), prosody)


def speech_recognition(studio: Studio) -> SyntheticExample:
    """One word, or in every sixth clip two: answer = the words."""
    words = [studio.balanced(WORDS, studio.number)]
    if studio.number % 6 == 5:
        words.append(studio.any([word for word in WORDS if word != words[0]]))
    voice = studio.any(studio.voices)
    spoken = [studio.say(word, voice=voice) for word in words]
    wave = record(spoken, studio.rng)
    return SyntheticExample(wave, studio.any(INSTRUCTIONS["asr"]), " ".join(words))


def emotion_recognition(studio: Studio) -> SyntheticExample:
    """A phrase without emotional words; the emotion is in the way it is spoken alone."""
    name = studio.balanced(tuple(EMOTIONS), studio.number)
    emotion = EMOTIONS[name]
    spoken = studio.say(studio.any(PHRASES), emotion.prosody)
    spoken = spoken / np.abs(spoken).max()
    if emotion.drive > 0:
        # Soft clipping adds the harmonics of a shouting voice.
        spoken = np.tanh(emotion.drive * spoken)
    wave = record([spoken], studio.rng, emotion.loudness)
    return SyntheticExample(wave, studio.any(INSTRUCTIONS["er"]), name)


def captioning(studio: Studio) -> SyntheticExample:
    """One sound, or in every second clip two in order: "a siren then knocking"."""
    names = [studio.balanced(tuple(SOUNDS), studio.number)]
    if studio.number % 2 == 1:
        names.append(studio.any([name for name in SOUNDS if name != names[0]]))
    wave = record([SOUNDS[name](studio.rng) for name in names], studio.rng)
    caption = " then ".join(CAPTIONS[name] for name in names)
    return SyntheticExample(wave, studio.any(INSTRUCTIONS["ac"]), caption)


def audio_question(studio: Studio) -> SyntheticExample:
    """In turn: which sound is it, how many beeps are there, is there a given sound."""
    turn, kind = divmod(studio.number, 3)
    if kind == 0:
        name = studio.balanced(tuple(SOUNDS), turn)
        wave = record([SOUNDS[name](studio.rng)], studio.rng)
        question = studio.any(("Which sound is it?", "What makes this sound?"))
        return SyntheticExample(wave, question, name)
    if kind == 1:
        count = studio.balanced(range(1, 1 + len(COUNTS)), turn)
        wave = record([beeps(studio.rng, count)], studio.rng)
        question = studio.any(("How many beeps are there?", "Count the beeps."))
        return SyntheticExample(wave, question, COUNTS[count - 1])
    asked, there = studio.balanced([(n, yes) for n in SOUNDS for yes in (True, False)], turn)
    name = asked if there else studio.any([other for other in SOUNDS if other != asked])
    wave = record([SOUNDS[name](studio.rng)], studio.rng)
    question = studio.any(("Is there {}?", "Do you hear {}?")).format(CAPTIONS[asked])
    return SyntheticExample(wave, question, "yes" if there else "no")


def speech_question(studio: Studio) -> SyntheticExample:
    """A spoken fact, "the cat is red", and in turn a question for its colour or its animal."""
    turn, kind = divmod(studio.number, 2)
    if kind == 0:
        colour, animal = studio.balanced(COLOURS, turn), studio.any(ANIMALS)
        questions, answer = ("What colour is it?", "Which colour is named?"), colour
    else:
        colour, animal = studio.any(COLOURS), studio.balanced(ANIMALS, turn)
        questions, answer = ("Which animal is it?", "What animal is named?"), animal
    wave = record([studio.say(f"the {animal} is {colour}")], studio.rng)
    return SyntheticExample(wave, studio.any(questions), answer)


TASKS: dict[str, Callable[[Studio], SyntheticExample]] = {
    "asr": speech_recognition,
    "er": emotion_recognition,
    "ac": captioning,
    "aqa": audio_question,
    "sqa": speech_question,
}
