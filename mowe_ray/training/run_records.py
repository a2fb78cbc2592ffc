"""What the folder of a run tells of its course, while it goes on and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mowe_ray.output.run_folder import RunFolder

Record = Mapping[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds.

    Attributes:
        config: Its `config.json`.
        records: Those of `metrics.jsonl`, oldest first.
        result, data: `result.json` and `data_report.json`; None before they are there.
        checkpoints: Names of those that are kept.
    """

    name: str
    url: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any] | None
    data: dict[str, Any] | None
    checkpoints: list[str]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def step(self) -> int:
        """Of the last record."""
        return max((int(record["step"]) for record in self.records), default=0)

    def course(self, *keys: str) -> Points:
        """Return `course` of the training records."""
        return course(self.of("train"), *keys)

    def last_scores(self) -> dict[str, dict[str, float]]:
        """Return the scores of the last validation of each source, by SOURCE/TASK, or by task of a single source."""
        last = {record.get("source", ""): record for record in self.of("validation")}
        return {
            f"{source}/{task}" if len(last) > 1 else task: scores
            for source, record in last.items()
            for task, scores in record["tasks"].items()
        }

    def validation_loss(self) -> float | None:
        """Return the loss of the last validation, its mean over sources; None where there is none."""
        last = {record.get("source", ""): record.get("loss") for record in self.of("validation")}
        known = [loss for loss in last.values() if isinstance(loss, int | float) and math.isfinite(loss)]
        return sum(known) / len(known) if known else None


def course(records: Sequence[Record], *keys: str) -> Points:
    """Return (step, value) of a number that records have under nested keys, where they have it."""
    found = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            found.append((float(record["step"]), float(value)))
    return found


def read_run(folder: RunFolder) -> Run:
    """Read what is there of a run.

    Raises:
        ValueError: The folder holds no run.
    """
    config = folder.find_json("config.json")
    if config is None or "training" not in config:
        raise ValueError(f"{folder.url} holds no run: it has no config.json of one")
    return Run(
        name=folder.url.rpartition("/")[2],
        url=folder.url,
        config=config,
        records=folder.read_records("metrics.jsonl", "kind", "step"),
        result=folder.find_json("result.json"),
        data=folder.find_json("data_report.json"),
        checkpoints=[name for name in folder.names("checkpoints") if name.startswith("step-")],
    )
