"""Trials: their state, the file `TRIAL/trial.json` that keeps it, and how their values are written.

A trial is one training run; trials of one point of the space differ in their seed only. The run itself writes its
metrics, checkpoints and reports into the same folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mowe_ray.output.charts import thinned
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.schema import POOL_KEY

TrialStatus = Literal["waiting", "running", "finished", "stopped", "failed"]
TRIAL_FILE = "trial.json"
_MOST_VALIDATIONS = 200  # of a trial whose course is thinned


@dataclass(frozen=True)
class ModelCost:
    """Size and work of a model.

    Attributes:
        stored: Parameters.
        active: Parameters that a clip uses, expected while the routers are undecided.
        gflops: 1e9 operations of a forward pass over a clip of 30 s, expected likewise.
    """

    stored: float
    active: float
    gflops: float


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: Counted from 0 in the order of the study; its folder is `trial-NNNN`.
        point: Trials with equal values share it.
        values: By entry of the space; a pool is the list of its encoders' names.
        status: `stopped` by the scheduler before its end, `failed` after all retries.
        attempts: How often it was started.
        step, percent: How far it is.
        loss: Of the last validation, mean over sources.
        tasks: `score`, `majority` and `samples` by task, of the last validation.
        wall_s: Time it was running; `device_s` is that times its workers.
        changed: Keys that population-based training has changed on the way, with their last values.
    """

    number: int
    point: int
    seed: int
    values: dict[str, Any]
    status: TrialStatus = "waiting"
    error: str | None = None
    attempts: int = 0
    step: int = 0
    percent: float = 0.0
    loss: float | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    cost: ModelCost | None = None
    wall_s: float = 0.0
    device_s: float = 0.0
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return trial_name(self.number)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in ("finished", "stopped", "failed")

    def objective(self, metric: str) -> float | None:
        """Return `score`, `score.TASK` or `loss` of the last validation; None before one, or without the task."""
        return objective(metric, self.loss, self.tasks)


def objective(metric: str, loss: float | None, tasks: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return `score` (mean over tasks), `score.TASK` or `loss` of a validation; None if it has no such number."""
    if metric == "loss":
        return loss
    _, _, task = metric.partition(".")
    scores = [values["score"] for name, values in tasks.items() if task in ("", name)]
    return sum(scores) / len(scores) if scores else None


@dataclass(frozen=True)
class Validation:
    """One validation on the way of a trial: loss is the mean over sources, `tasks` as in `Trial`."""

    step: int
    loss: float
    tasks: dict[str, dict[str, float]]


@dataclass(frozen=True)
class History:
    """The course of a trial.

    Attributes:
        validations: In order.
        train_loss: (step, next-token loss) in order.
        routing: The run's router report; None without routers or before the end.
    """

    validations: list[Validation] = field(default_factory=list)
    train_loss: list[tuple[float, float]] = field(default_factory=list)
    routing: dict[str, Any] | None = None

    def thinned(self) -> History:
        """Return the course with as many points as a curve shows, and the routing without its own course."""
        routing = None if self.routing is None else {k: v for k, v in self.routing.items() if k != "training"}
        every = -(-len(self.validations) // _MOST_VALIDATIONS) or 1
        return History(self.validations[::-1][::every][::-1], thinned(self.train_loss), routing)


def trial_name(number: int) -> str:
    """Return the name of a trial's run folder."""
    return f"trial-{number:04d}"


def run_folder(study: RunFolder, trial: Trial) -> RunFolder:
    """Return the run folder of a trial of the study in the folder `study`."""
    return RunFolder(study.url, trial.name)


def save(study: RunFolder, trial: Trial) -> None:
    """Write a trial's file."""
    study.write_json(f"{trial.name}/{TRIAL_FILE}", asdict(trial))


def folder_numbers(study: RunFolder) -> list[int]:
    """Return the numbers of the trials that have a folder, in order, whether their file is whole or not."""
    return sorted(int(name.removeprefix("trial-")) for name in study.names("") if re.fullmatch(r"trial-\d+", name))


def load_all(study: RunFolder, log: Callable[[str], object] = lambda line: None) -> list[Trial]:
    """Return the trials of a study, by number; one whose file is damaged is left out, and `log` says so."""
    trials = []
    for name in (trial_name(number) for number in folder_numbers(study)):
        if study.exists(file := f"{name}/{TRIAL_FILE}"):
            try:
                record = study.read_json(file)
                trials.append(Trial(**{**record, "cost": record["cost"] and ModelCost(**record["cost"])}))
            except (ValueError, TypeError, KeyError) as error:
                log(
                    f"warning: {study.path(file)} is damaged, and its point will be run again as another trial: {error}"
                )
    return trials


def history(folder: RunFolder) -> History:
    """Read the course of a trial from its run folder."""
    records = folder.read_records("metrics.jsonl", "kind", "step")
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "validation":
            by_step.setdefault(record["step"], []).append(record)
    return History(
        [joined(step, sources) for step, sources in sorted(by_step.items())],
        [(r["step"], r["lm_loss"]) for r in records if r["kind"] == "train" and r["lm_loss"] is not None],
        folder.find_json("router_report.json"),  # without one that is damaged a report shows the rest
    )


def joined(step: int, sources: list[dict[str, Any]]) -> Validation:
    """Join the validations of several sources: a task that several have stands under SOURCE/TASK."""
    counts: dict[str, int] = {}
    for source in sources:
        for task in source["tasks"]:
            counts[task] = counts.get(task, 0) + 1
    tasks = {
        task if counts[task] == 1 else f"{source['source']}/{task}": dict(values)
        for source in sources
        for task, values in source["tasks"].items()
    }
    losses = [source["loss"] for source in sources if source["loss"] is not None]
    return Validation(step, sum(losses) / len(losses) if losses else float("nan"), tasks)


def with_validation(trial: Trial, validation: Validation, percent: float) -> Trial:
    """Return the trial after a validation."""
    return replace(trial, step=validation.step, percent=percent, loss=validation.loss, tasks=validation.tasks)


_SECTIONS = ("model", "data", "training", "compute")


def pool_label(names: Sequence[str]) -> str:
    """Write a pool: "no pool", "3 x whisper", "hubert + 2 x whisper"."""
    counts = {name: names.count(name) for name in names}
    parts = [name if count == 1 else f"{count} x {name}" for name, count in counts.items()]
    return " + ".join(parts) or "no pool"


def entry_label(value: Any) -> str:
    """Write the value of an entry; a list of names is a pool."""
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return pool_label(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def entry_name(name: str) -> str:
    """Write the name of an entry: "pool", or the key without its section."""
    section, _, rest = name.partition(".")
    return "pool" if name == POOL_KEY else rest if section in _SECTIONS and rest else name


def point_label(values: Mapping[str, Any], most: int | None = None) -> str:
    """Write a point: the pool, then the other entries as `name = value`.

    With more than `most` characters, words stand without their names, and the rest is left out.
    """
    pool = [entry_label(values[POOL_KEY])] if POOL_KEY in values else []
    others = {f"{entry_name(name)} = ": value for name, value in values.items() if name != POOL_KEY}
    label = ", ".join([*pool, *(name + entry_label(value) for name, value in others.items())])
    if most is not None and len(label) > most:
        words = (("" if isinstance(value, str) else name) + entry_label(value) for name, value in others.items())
        label = ", ".join([*pool, *words])
        label = label if len(label) <= most else label[: most - 1] + "…"
    return label or "the base configuration"
