"""Clips that the page offers to try, of a validation set."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import load_in_child


@dataclass(frozen=True)
class Example:
    """A clip with its question and right answer; `audio` is its encoded file."""

    id: str
    task: str
    question: str
    answer: str
    audio: bytes

    def card(self) -> dict[str, Any]:
        """Return what is shown of it before it is fetched."""
        return {"id": self.id, "task": self.task, "question": self.question, "answer": self.answer}


def examples_of(index: Index, count: int, min_s: float, max_s: float) -> list[Example]:
    """Return about `count` samples of an index, of all its tasks in turn.

    Args:
        index: Of a validation set.
        count: How many.
        min_s: Shorter clips are passed over, in seconds.
        max_s: Longer clips are, too.
    """
    by_task: dict[str, list[int]] = {}
    for row, (task, seconds) in enumerate(zip(index.table["task"].to_pylist(), index.durations, strict=True)):
        if min_s <= seconds <= max_s:
            by_task.setdefault(task, []).append(row)
    turns = [row for rows in _in_turn(list(by_task.values())) for row in rows][:count]
    if not turns:
        return []
    batch = load_in_child(index.take(turns), min_s, max_s)
    return [
        Example(batch.ids[row], batch.tasks[row], batch.instructions[row], batch.answers[row], _flac(clips[0]))
        for row, (clips, history) in enumerate(zip(batch.clips(), batch.turns_before, strict=True))
        if len(clips) == 1 and not history
    ]


def _in_turn(groups: list[list[int]]) -> list[list[int]]:
    """Return the first of each group, then the second of each ..."""
    longest = max(map(len, groups), default=0)
    return [[group[place] for group in groups if place < len(group)] for place in range(longest)]


def _flac(wave: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE, format="FLAC")
    return file.getvalue()
