"""The answers to a dataset on storage: written as they come, and resumed by the next run.

    predictions/DATASET.jsonl        one line an answer (`Answer`), in the order of the plan
    predictions/DATASET.steps.jsonl  the settings, then one line a micro-batch that is finished

An evaluation that was killed resumes after the last finished micro-batch; lines of an unfinished one are dropped.
The plan does not change, so the files equal those of an evaluation without interruption.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from mowe_ray.data.sample import BadSample
from mowe_ray.output.run_folder import RunFolder

T = TypeVar("T")
# Every write to an object store is an object of its own.
_REMOTE_FLUSH_S = 30.0


class Predictions:
    """The answers to one dataset under one set of settings."""

    def __init__(self, folder: RunFolder, name: str, settings: Mapping[str, Any]):
        """Find what an earlier run with equal settings has finished; answers under other settings are dropped.

        Args:
            folder: Of the evaluation.
            name: Of the file, below the folder, without suffix.
            settings: JSON values that determine the answers.

        Attributes:
            finished: Number of micro-batches of the plan that need not run again.
            replaced: Names of the settings that differ from those of the stored answers; empty without any.
        """
        self._folder, self._file, self._steps = folder, f"{name}.jsonl", f"{name}.steps.jsonl"
        self._answers: list[str] = []
        self._records: list[dict[str, Any]] = []
        self._unwritten: list[tuple[str, str]] = []
        self._flushed = time.monotonic()
        # Once to JSON and back, so that equal settings are equal.
        wanted = json.loads(json.dumps({"settings": settings}))
        self._wanted = wanted
        self.replaced: list[str] = []
        lines = self._until_damage(self._steps, json.loads)
        if lines and lines[0] == wanted:
            self._resume(lines[1:])
        elif lines:
            before, after = lines[0]["settings"], wanted["settings"]
            self.replaced = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        self.finished = len(self._records)

    def _resume(self, records: list[dict[str, Any]]) -> None:
        stored = self._folder.read_lines(self._file)[: len(self._until_damage(self._file, Answer.from_line))]
        for record in records:
            end = len(self._answers) + record["answers"]
            # The answers of this record did not all reach storage: it and what follows are answered again.
            if end > len(stored):
                break
            self._answers += stored[len(self._answers) : end]
            self._records.append(record)

    def _until_damage(self, file: str, read: Callable[[str], T]) -> list[T]:
        """Return what the lines of a file hold, up to the first that is damaged: what follows is answered again."""
        values = []
        for line in self._folder.read_lines(file):
            try:
                values.append(read(line))
            except (ValueError, TypeError, KeyError):
                break
        return values

    def begin(self) -> None:
        """Truncate the files to what is finished; must be called before the first `add`."""
        self._folder.write_lines(self._file, self._answers)
        self._folder.write_lines(self._steps, (json.dumps(r) + "\n" for r in [self._wanted, *self._records]))

    def add(self, answers: Sequence[Answer], bad: Sequence[BadSample], *, audio_s: float, seconds: float) -> None:
        """Add the answers to the next micro-batch of the plan.

        Args:
            answers: Answers to its samples.
            bad: Samples that could not be used.
            audio_s: Seconds of audio.
            seconds: Seconds the model took.
        """
        causes = [[sample.id, sample.cause, sample.detail] for sample in bad]
        record = {"answers": len(answers), "audio_s": audio_s, "seconds": seconds, "bad": causes}
        lines = [answer.to_line() for answer in answers]
        self._answers += lines
        self._records.append(record)
        self._unwritten.append(("".join(lines), json.dumps(record) + "\n"))
        if self._folder.local_path("") is not None or time.monotonic() - self._flushed > _REMOTE_FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._unwritten:
            # The answers first: a micro-batch is finished once its own line is there.
            self._folder.append_text(self._file, "".join(lines for lines, _ in self._unwritten))
            self._folder.append_text(self._steps, "".join(record for _, record in self._unwritten))
        self._unwritten, self._flushed = [], time.monotonic()

    def close(self) -> None:
        """Write what is not written yet; on an object store, as one file again."""
        self.flush()
        if self._folder.local_path("") is None:
            self.begin()

    def answers(self) -> list[Answer]:
        """Return all answers so far."""
        return [Answer.from_line(line) for line in self._answers]

    @property
    def audio_s(self) -> float:
        """Seconds of audio answered so far."""
        return sum(float(record["audio_s"]) for record in self._records)

    @property
    def seconds(self) -> float:
        """Seconds the model took for it, of all workers together."""
        return sum(float(record["seconds"]) for record in self._records)

    @property
    def bad(self) -> dict[str, int]:
        """Samples that could not be used, by cause."""
        return dict(Counter(cause for record in self._records for _, cause, _ in record["bad"]).most_common())


@dataclass(frozen=True)
class RouterChoice:
    """One router's decision for a clip, with M pool members.

    Attributes:
        load: M shares of the clip each member was run on: 0 or 1, unless the clip was answered in chunks.
        probabilities: M numbers, mean over the chunks.
    """

    load: list[float]
    probabilities: list[float]


@dataclass(frozen=True)
class Answer:
    """One answered sample.

    Attributes:
        id: Unique within the dataset.
        references: The answers that count as right.
        choices: Of a multiple-choice question.
        groups: What the sample is scored apart by, such as {category: Reasoning, difficulty: hard}.
        duration_s: Of the clip; 0 for text alone.
        independent: Choice of the data-independent router; None if it is off, or there was no clip.
        dependent: Choice of the data-dependent router, likewise.
        shard: Path or URL of the file that holds the sample.
        place: Where it lies in there: the columns of the index by which its shard's reader finds it.
        path: What its row calls its audio file; empty where the audio lies in the shard.
    """

    id: str
    task: str
    instruction: str
    answer: str
    references: list[str]
    duration_s: float = 0.0
    independent: RouterChoice | None = None
    dependent: RouterChoice | None = None
    shard: str = ""
    place: dict[str, Any] | None = None
    path: str = ""
    choices: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)

    def to_line(self) -> str:
        """Return the answer as a line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Answer:
        """Read what `to_line` wrote."""
        fields = json.loads(line)
        choices = {
            name: RouterChoice(**fields[name]) for name in ("independent", "dependent") if fields[name] is not None
        }
        return cls(**{**fields, **choices})


def by_task(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Group answers by task, sorted by its name; within a task their order stays."""
    tasks: dict[str, list[Answer]] = {}
    for answer in answers:
        tasks.setdefault(answer.task, []).append(answer)
    return dict(sorted(tasks.items()))
