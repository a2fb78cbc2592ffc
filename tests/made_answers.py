"""Answers made by a seed: empty ones, repeated words, other scripts, near misses, several references."""

import random

from mowe_ray.evaluation.predictions import Answer

WORDS = (
    *(
        "a",
        "the",
        "an",
        "dog",
        "dogs",
        "barks",
        "barking",
        "barked",
        "loudly.",
        "while,",
        "rain",
        "falls!",
        "on",
        "roof",
    ),
    *("empty", "Straße", "naïve", "é", "犬が", "吠える", "Привет", "don't", "high-pitched", "hello-hello", "..."),
    *("2", "two", "um", "(laughs)"),
)
LABELS = ["happy", "very happy", "sad", "Neutral", "freude"]


def some_text(rng: random.Random, least: int = 0, most: int = 8) -> str:
    words = rng.choices(WORDS, k=rng.randint(least, most))
    if rng.random() < 0.3:
        words = [word for word in words for _ in range(rng.randint(1, 2))]
    return rng.choice([" ", "  "]).join(words)


def near(rng: random.Random, text: str) -> str:
    """`text` with some words changed, dropped or moved; sometimes something else altogether."""
    words = [rng.choice(WORDS) if rng.random() < 0.2 else word for word in text.split() if rng.random() > 0.1]
    if rng.random() < 0.2:
        rng.shuffle(words)
    return " ".join(words) if rng.random() < 0.85 else some_text(rng)


def answers_of(task: str, number: int = 240, seed: int = 0, most_words: int = 8) -> list[Answer]:
    rng = random.Random(seed)
    made = []
    for i in range(number):
        references = [some_text(rng, most=most_words) for _ in range(rng.choice([1, 1, 2, 3]))]
        answer = near(rng, rng.choice(references))
        made.append(Answer(id=str(i), task=task, instruction="?", answer=answer, references=references))
    return made


def labelled_answers(number: int = 240, seed: int = 0) -> list[Answer]:
    rng = random.Random(seed)
    frames = ["{}", "{}.", " {} ", "The speaker is {}!", "{} or {}", "un{}ish"]
    made = []
    for i in range(number):
        references = [
            rng.choice([label, f"{label.upper()}!"]) for label in rng.sample(LABELS[:4], rng.choice([1, 1, 2]))
        ]
        label = references[0].strip("!").lower() if rng.random() < 0.6 else rng.choice(LABELS)
        answer = rng.choice(frames).format(label, rng.choice(LABELS))
        made.append(Answer(id=str(i), task="er", instruction="?", answer=answer, references=references))
    return made
