"""What the trials of a study scored on each clip, in `clip_scores.json`: points are compared on equal clips by it.

A run leaves the answers of its last validation in `answers/SOURCE.jsonl`. They are read once, when its trial has
ended; what is kept of them is small enough to be put beside a paper, and the report is drawn from it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mowe_ray.evaluation.predictions import Answer, by_task
from mowe_ray.evaluation.scoring import majority_answers, score_statistics
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.trials import Trial, run_folder

FILE = "clip_scores.json"
ANSWERS = "answers"  # folder of a run
Array = npt.NDArray[np.float64]


@dataclass
class TaskClips:
    """The clips of one task of a source, N of them.

    Attributes:
        ids: N names, in the order of all else.
        majority: Score of always giving the most frequent answer.
        trials: By number, (N, 2): the score of any set of clips is the sum of the first column over that of the
            second, at least 0; NaN for clips that a trial has not answered.
    """

    ids: list[str]
    majority: float
    trials: dict[int, Array] = field(default_factory=dict)


@dataclass
class ClipScores:
    """Scores by (source, task).

    Attributes:
        is_saved: Whether the file has them all.
    """

    tasks: dict[tuple[str, str], TaskClips] = field(default_factory=dict)
    is_saved: bool = True
    _read: set[int] = field(default_factory=set)  # trials, some of which have left no answers

    @classmethod
    def load(cls, study: RunFolder) -> ClipScores:
        """Read the file of a study; a missing or damaged one is made again from the trials."""
        tasks = {}
        try:
            for row in (study.find_json(FILE) or {})["tasks"]:
                known = {int(number): np.array(values, np.float64).T for number, values in row["trials"].items()}
                tasks[row["source"], row["task"]] = TaskClips(row["ids"], row["majority"], known)
        except (KeyError, TypeError, ValueError):
            return cls()
        return cls(tasks, _read={number for clips in tasks.values() for number in clips.trials})

    def save(self, study: RunFolder) -> None:
        """Write the file: columns of scores and of weights for each trial."""
        rows: list[dict[str, Any]] = []
        for (source, task), clips in sorted(self.tasks.items()):
            row = {"source": source, "task": task, "majority": clips.majority, "ids": clips.ids}
            rows.append(row | {"trials": {number: _columns(values) for number, values in sorted(clips.trials.items())}})
        # A line for each task, so that versions can be compared.
        lines = ",\n".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in rows)
        study.write_text(FILE, f'{{"tasks": [\n{lines}\n]}}\n')
        self.is_saved = True

    def add(self, study: RunFolder, trials: Iterable[Trial]) -> None:
        """Read what finished trials have answered, of those that were not looked at; damaged files are left out."""
        for trial in trials:
            if trial.status == "finished" and trial.number not in self._read:
                self._read.add(trial.number)
                self._add(trial.number, run_folder(study, trial))

    def _add(self, number: int, run: RunFolder) -> None:
        for name in run.names(ANSWERS):
            try:
                answers = [Answer.from_line(line) for line in run.read_lines(f"{ANSWERS}/{name}")]
            except (KeyError, TypeError, ValueError):
                continue
            for task, rows in by_task(answers).items():
                self._add_task(number, name.removesuffix(".jsonl"), task, rows)

    def _add_task(self, number: int, source: str, task: str, answers: Sequence[Answer]) -> None:
        statistics, most = score_statistics(task, answers), score_statistics(task, majority_answers(answers))
        if statistics is None or most is None:  # the score of a set is no mean over its clips
            return
        fresh = TaskClips([answer.id for answer in answers], float(ratio(most.sum(0))))
        clips = self.tasks.setdefault((source, task), fresh)
        row_of = {answer.id: row for row, answer in enumerate(answers)}
        values = np.full((len(clips.ids), 2), np.nan)
        for place, name in enumerate(clips.ids):
            if name in row_of:
                values[place] = statistics[row_of[name]]
        clips.trials[number] = values
        self.is_saved = False


def ratio(sums: Array) -> Array:
    """Return the score of sums (..., 2) of scores and weights."""
    score: Array = np.maximum(sums[..., 0] / sums[..., 1], 0.0)
    return score


def _columns(values: Array) -> list[list[float | None]]:
    return [
        [None if np.isnan(x) else int(x) if x == int(x) else round(float(x), 6) for x in column] for column in values.T
    ]
