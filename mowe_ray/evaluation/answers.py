"""What a model said about a sample, and which encoders it listened with: a line of `predictions/DATASET.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Choice:
    """One router's decision for a clip, with M pool members.

    Attributes:
        load: M shares of the clip each member was run on: 0 or 1, unless the clip was heard in pieces.
        probabilities: M numbers, mean over the pieces.
    """

    load: list[float]
    probabilities: list[float]


@dataclass(frozen=True)
class Answer:
    """One answered sample.

    Attributes:
        id: Unique within the dataset.
        references: The answers that count as right.
        duration_s: Of the clip; 0 for text alone.
        independent: What the data-independent router chose; None if it is off, or there was no clip.
        dependent: What the data-dependent router chose, likewise.
    """

    id: str
    task: str
    instruction: str
    answer: str
    references: list[str]
    duration_s: float = 0.0
    independent: Choice | None = None
    dependent: Choice | None = None

    def to_line(self) -> str:
        """Return the answer as a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Answer:
        """Read what `to_line` wrote."""
        fields = json.loads(line)
        choices = {name: Choice(**fields[name]) for name in ("independent", "dependent") if fields[name] is not None}
        return cls(**{**fields, **choices})


def by_task(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Sort answers into their tasks, by name; within a task their order stays."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.task, []).append(answer)
    return dict(sorted(found.items()))
