"""Multiple choice: how the choices of a sample are asked about, and what its answer is then.

The task `mcq` is answered with the text of a choice, and its choices have no letters: an article's letter would be
taken for a choice by MMAU's rule. The task `mcq_letter` is answered with a letter alone.
"""

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from mowe_ray.data.shards.fields import CHOICES_KEYS, GROUPS_KEYS, as_text

BY_TEXT, BY_LETTER = "mcq", "mcq_letter"
LETTERS = string.ascii_uppercase


def find_choices(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the choices of a row, if there is a list of them."""
    for value in (fields.get(key) for key in CHOICES_KEYS):
        if isinstance(value, list):
            return tuple(text for text in map(as_text, value) if text)
    return ()


def find_groups(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return what a row is scored apart by (category, difficulty, ...), from a mapping or the JSON of one."""
    for value in (fields.get(key) for key in GROUPS_KEYS):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if isinstance(value, Mapping):
            return {str(name): text for name, text in ((name, as_text(group)) for name, group in value.items()) if text}
    return {}


def with_choices(instruction: str, choices: Sequence[str], task: str) -> str:
    """Return the question followed by its choices; one that ends with them already, as in written shards, stays.

    Args:
        task: Empty where it is not known yet: nothing is added then.
    """
    if not choices or not task:
        return instruction
    if task == BY_LETTER:
        lettered = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        listing = "\n".join([*lettered, "Answer with the letter of the right choice."])
    else:
        listing = "\n".join(["Answer with one of these choices:", *choices])
    return instruction if instruction.endswith(listing) else f"{instruction}\n{listing}".strip()


def answer_among(answer: str, choices: Sequence[str], task: str) -> str:
    """Return the answer to learn: for `mcq_letter` the letter of a choice that is given by its text."""
    return LETTERS[choices.index(answer)] if task == BY_LETTER and answer in choices[: len(LETTERS)] else answer
