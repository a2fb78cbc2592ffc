"""What a tracker takes, and the names it gives: those of a record begin with the record's kind.

A record has a `kind` (train, validation, ...), a `step` and numbers. Those of a validation begin with
`validation/SOURCE`, so that sources never overwrite each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mowe_ray.evaluation.predictions import Answer
from mowe_ray.output.run_folder import RunFolder

Record = Mapping[str, Any]
Records = Callable[[], Iterable[Record]]
Waves = Mapping[str, npt.NDArray[np.float32]]

IDS_FILE = "trackers.json"
"""In the run folder: the ids that wandb and MLflow know the run by."""
COLUMNS = ["id", "task", "instruction", "reference", "answer"]
"""Of a table of samples."""


class MetricTracker(Protocol):
    """What a tracker takes; it may raise what it likes, the caller goes on without it."""

    def log(self, record: Record) -> None:
        """Add the numbers of a record."""

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        """Add a picture."""

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        """Add answers to samples of a validation source, with the audio of each by its id."""

    def flush(self) -> None:
        """Make durable what was added, before a checkpoint; called from any thread."""

    def close(self) -> None:
        """Finish."""


class ContinuedTracker:
    """A tracker that remembers what it got: it takes from the records of the run what it has not."""

    def __init__(self, known: Mapping[str, Any]):
        """Take the last number by name, of which `GROUP/step` say how far each group of names has come."""
        self._known = known

    def is_new(self, record: Record) -> bool:
        """Whether the tracker lacks a record."""
        return bool(record["step"] > (self._known.get(f"{group_of(record)}/step") or -1))


def group_of(record: Record) -> str:
    """Return the first part of the names of a record's numbers."""
    return f"validation/{record['source']}" if record["kind"] == "validation" else str(record["kind"])


def numbers_of(record: Record) -> dict[str, int | float]:
    """Return the numbers of a record by their names: `train/loss`, `validation/SOURCE/TASK/score`, ..."""
    group = group_of(record)
    values = {key: value for key, value in record.items() if key not in ("step", "tasks")}
    named = {f"{group}/{key}": value for key, value in flatten(values).items()}
    for task, scores in record.get("tasks", {}).items():
        named |= {f"{group}/{task}/{key}": value for key, value in scores.items()}
    return {key: value for key, value in named.items() if isinstance(value, int | float)}


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def row_of(answer: Answer) -> list[str]:
    """Return an answer as a row of a table of samples."""
    return [answer.id, answer.task, answer.instruction, answer.references[0], answer.answer]


def read_ids(folder: RunFolder) -> dict[str, str]:
    """Return the ids of a run by tracker."""
    return {key: str(value) for key, value in (folder.find_json(IDS_FILE) or {}).items()}
