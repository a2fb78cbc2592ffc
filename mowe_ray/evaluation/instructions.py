"""Usual phrasings of tasks whose samples need no question of their own (`generation.instruction=task`)."""

from __future__ import annotations

import random
from collections.abc import Sequence

_PHRASINGS = {
    "asr": (
        "Write out every word that is spoken.",
        "Transcribe what the speaker says.",
        "What are the exact words of this recording?",
        "Turn the speech into written text.",
        "Give a word-for-word transcript.",
        "Listen to the speech and type it.",
        "Note down the spoken sentence.",
        "Which words are being said here?",
    ),
    "ac": (
        "Describe in one sentence what can be heard.",
        "Write a caption for this sound clip.",
        "Sum up the sounds of this recording.",
        "What is going on in this audio?",
        "Put the sounds you hear into words.",
        "Say in short what this clip sounds like.",
        "Which sounds occur here? Answer with a sentence.",
        "Tell someone who cannot hear it what is in the recording.",
    ),
    "er": (
        "Which emotion does the voice express?",
        "How does the speaker feel?",
        "Name the feeling in this voice.",
        "Judging by the tone, what mood is the speaker in?",
        "What emotion do you hear?",
        "Choose the emotion that fits the speaker.",
        "With which feeling is this said?",
        "Tell the emotional state of the person who speaks.",
    ),
}
_WITH_LABELS = ("er",)


def instruction_of(task: str, sample_id: str, labels: Sequence[str] | None, seed: int) -> str | None:
    """Draw a usual phrasing for a sample; the same for the same id and seed, whatever else is asked.

    Args:
        labels: The closed list that the question of a classification ends with.

    Returns:
        None if the task has no usual phrasing, or needs labels and there are none: ask what the sample itself asks.
    """
    if task not in _PHRASINGS or (task in _WITH_LABELS and not labels):
        return None
    phrasing = random.Random(f"{seed} {sample_id}").choice(_PHRASINGS[task])
    return f"{phrasing} ({', '.join(labels)})" if labels and task in _WITH_LABELS else phrasing
