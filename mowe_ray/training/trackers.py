"""TensorBoard, wandb and MLflow: each continues its own history when a run does, without missing or doubled steps.

A record has a `kind` (train, validation, ...), a `step` and numbers; its group of names is the kind, and for a
validation `validation/SOURCE`, so that sources never overwrite each other.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import soundfile

from mowe_ray.config.schema import TrackingSection
from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.output.run_folder import RunFolder, sync

Record = Mapping[str, Any]
Records = Callable[[], Iterable[Record]]
Waves = Mapping[str, npt.NDArray[np.float32]]

_IDS_FILE = "trackers.json"  # the ids that wandb and MLflow know the run by
_EXPERIMENT = "mowe_ray"  # of MLflow, unless its own MLFLOW_EXPERIMENT_NAME names another
_PART_BYTES = 1 << 20  # a file of events on an object store; while it grows it is copied as a whole
_COLUMNS = ["id", "task", "instruction", "reference", "answer"]
_MOST_AT_ONCE = 100  # parameters that MLflow takes in one request
_FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in its names of metrics
_LONGEST = 500  # characters of one of them


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


def tracker_openers(
    folder: RunFolder,
    tracking: TrackingSection,
    *,
    name: str,
    config: Mapping[str, Any],
    resume_step: int,
    records: Records,
) -> list[Callable[[], MetricTracker]]:
    """Return what opens each tracker that is on, for a run that continues after `resume_step`; for rank 0 only.

    Args:
        name: Of the run, for people.
        records: Returns all records up to `resume_step`, and those that were logged since.
    """
    openers: list[Callable[[], MetricTracker]] = []
    if tracking.tensorboard:
        openers.append(lambda: TensorBoard(folder, resume_step, records))
    if tracking.wandb.mode != "off":
        openers.append(lambda: Wandb(folder, tracking, name, config, records))
    if (uri := tracking.mlflow) is not None:
        openers.append(lambda: Mlflow(folder, uri, name, config, records))
    return openers


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


class TensorBoard:
    """Event files in `tensorboard/` of the run folder, complete after every record.

    A start begins a new file, and marks in it from which step on the earlier files no longer count (`purge_step`), so
    that TensorBoard shows each step once. On an object store, which cannot append, files are written here and copied,
    and a new one is begun before one becomes large.
    """

    def __init__(self, folder: RunFolder, resume_step: int, records: Records):
        """Continue after `resume_step`, or from the records if there are no events yet."""
        self._folder, self._records = folder, records
        local = folder.local_path("tensorboard")
        self._copies = local is None
        self._path = local or Path(tempfile.mkdtemp(prefix="mowe_ray_tensorboard_"))
        self._copied: dict[str, int] = {}
        self._heard: set[str] = set()
        self._lock = threading.RLock()  # of the training thread and the one that copies
        earlier = any("tfevents" in name for name in folder.names("tensorboard"))
        self._missing_from = resume_step + 1 if earlier else 0
        self._failed = False
        self._writer: Any = None
        self._reopen()

    def _reopen(self) -> None:
        """Begin a new file if the last one failed, with all records from the first one on that is missing."""
        from torch.utils.tensorboard import SummaryWriter  # optional: slow to import

        first = self._missing_from
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = SummaryWriter(str(self._path), purge_step=first)
        for record in self._records():
            if record["step"] >= first:
                self._add(record)
        self._writer.flush()
        self._failed = False

    def _add(self, record: Record) -> None:
        for name, value in numbers_of(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def log(self, record: Record) -> None:
        with self._lock:
            if self._failed:
                self._try_again()  # the record is among those that it adds
                return
            try:
                self._add(record)
                self._writer.flush()
            except OSError:  # a full disk: a part of the record may be written
                self._failed, self._missing_from = True, record["step"]
                raise

    def _try_again(self) -> None:
        try:
            self._reopen()
        except OSError:
            for file in self._path.glob("*tfevents*"):
                if not file.stat().st_size:  # there is no room for a first event
                    file.unlink()
            raise

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        from matplotlib.image import imread

        with self._lock:
            self._writer.add_image(name, imread(io.BytesIO(png)), step, dataformats="HWC")
            self._writer.flush()

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        lines = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_row, answers)]
        table = "\n".join("|".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) for line in lines)
        with self._lock:
            self._writer.add_text(f"validation/{source}/samples", table, step)
            for name in waves.keys() - self._heard:  # once: a clip never changes
                self._heard.add(name)
                self._writer.add_audio(f"validation/{source}/{name}", waves[name][None], step, SAMPLE_RATE)
            self._writer.flush()

    def flush(self) -> None:
        with self._lock:
            self._writer.flush()
            sizes = {file: file.stat().st_size for file in self._path.glob("*tfevents*")}
            grown = [file for file, size in sizes.items() if self._copied.get(file.name) != size]
            for file in grown:
                self._copied[file.name] = sizes[file]
                if self._copies:
                    self._folder.put(file, f"tensorboard/{file.name}")
                else:
                    sync(file)
            if self._copies and any(sizes[file] > _PART_BYTES for file in grown):
                self._writer.close()  # what comes next begins another file

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._copies:
            shutil.rmtree(self._path, ignore_errors=True)


class _Continued:
    """A tracker that remembers what it got: it takes from the records of the run what it has not."""

    def __init__(self, known: Mapping[str, Any]):
        """Take the last number by name, of which `GROUP/step` say how far each group of names has come."""
        self._known = known

    def _is_new(self, record: Record) -> bool:
        return bool(record["step"] > (self._known.get(f"{group_of(record)}/step") or -1))


class Wandb(_Continued):
    """A wandb run with an id of its own, which the run folder keeps.

    Online it continues that run. What wandb writes offline cannot be continued: a start writes it anew from the first
    record on, in place of the folder that the interrupted one left.
    """

    def __init__(
        self, folder: RunFolder, tracking: TrackingSection, name: str, config: Mapping[str, Any], records: Records
    ):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing phones home
        import wandb  # optional: starts a service process

        self._folder, self._wandb, settings = folder, wandb, tracking.wandb
        self._online = settings.mode == "online"
        ids = _ids(folder)
        known = "wandb" in ids
        self._id = ids.setdefault("wandb", secrets.token_hex(8))
        folder.write_json(_IDS_FILE, ids)
        for left in folder.names("wandb"):
            if left.startswith("offline-run-") and left.endswith(self._id):
                folder.remove(f"wandb/{left}")
        local = folder.local_path("")
        self._scratch = None if local else Path(tempfile.mkdtemp(prefix="mowe_ray_wandb_"))
        self._run = wandb.init(
            mode="online" if self._online else "offline",
            project=settings.project,
            group=settings.group,
            name=name,
            id=self._id,
            resume="allow" if self._online else None,
            dir=str(local or self._scratch),
            config=dict(config),
            settings=wandb.Settings(console="off", reinit="finish_previous"),
        )
        super().__init__(dict(self._run.summary) if known and self._online else {})
        self._groups: set[str] = set()
        for record in records():
            self.log(record)

    def log(self, record: Record) -> None:
        if self._is_new(record):
            self._log(group_of(record), record["step"], numbers_of(record))

    def _log(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        # Its own steps only grow, and the validation of an earlier step may come late: each group has steps of its own.
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._run.log({**values, f"{group}/step": step})

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        from matplotlib.image import imread

        self._log(f"pictures/{name}", step, {name: self._wandb.Image(imread(io.BytesIO(png)))})

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        table = self._wandb.Table(columns=["audio", *_COLUMNS])
        for answer in answers:
            table.add_data(self._wandb.Audio(waves[answer.id], sample_rate=SAMPLE_RATE), *_row(answer))
        self._log(f"samples/{source}", step, {f"samples/{source}/table": table})

    def flush(self) -> None:
        """Nothing: its service process has what was logged."""

    def close(self) -> None:
        self._run.finish()
        if self._scratch is not None:
            self._folder.upload(self._scratch / "wandb", "wandb")
            shutil.rmtree(self._scratch, ignore_errors=True)  # its service may still hold a log in it


class Mlflow(_Continued):
    """A run of MLflow, through its own client: a server, or a folder as its URI."""

    def __init__(self, folder: RunFolder, uri: str, name: str, config: Mapping[str, Any], records: Records):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing phones home
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient  # optional

        self._client = MlflowClient(uri)
        self._sent: Any = None
        ids = _ids(folder)
        if "mlflow" not in ids:
            ids["mlflow"] = self._create(name, config)
            folder.write_json(_IDS_FILE, ids)
        self._id = ids["mlflow"]
        self._client.update_run(self._id, status="RUNNING")
        super().__init__(self._client.get_run(self._id).data.metrics)
        self._heard: set[str] = set()
        for record in records():
            self.log(record)

    def _create(self, name: str, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run = str(self._client.create_run(number, run_name=name).info.run_id)
        params = [Param(key, str(value)[:_LONGEST]) for key, value in flatten(config).items()]
        for start in range(0, len(params), _MOST_AT_ONCE):
            self._client.log_batch(run, params=params[start : start + _MOST_AT_ONCE])
        self._client.log_dict(run, dict(config), "config.json")
        return run

    def log(self, record: Record) -> None:
        from mlflow.entities import Metric

        if not self._is_new(record):
            return
        step, now_ms = record["step"], int(time.time() * 1000)
        values = {**numbers_of(record), f"{group_of(record)}/step": step}
        metrics = [Metric(_FORBIDDEN.sub("_", name), float(value), now_ms, step) for name, value in values.items()]
        # In a thread of the client: a step does not wait for a server.
        self._sent = self._client.log_batch(self._id, metrics=metrics, synchronous=False)

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        self._artifact(f"{name}-{step:08d}.png", png)

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        for name in waves.keys() - self._heard:
            self._heard.add(name)
            file = io.BytesIO()
            soundfile.write(file, waves[name], SAMPLE_RATE, format="FLAC")
            self._artifact(f"samples/{source}/{name}.flac", file.getvalue())
        table = {"columns": _COLUMNS, "data": [_row(answer) for answer in answers]}
        self._client.log_dict(self._id, table, f"samples/{source}/step-{step:08d}.json")

    def _artifact(self, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="mowe_ray_mlflow_") as scratch:
            file = Path(scratch, Path(name).name)
            file.write_bytes(content)
            self._client.log_artifact(self._id, str(file), str(Path(name).parent))

    def flush(self) -> None:
        """Nothing: a server that is slow must not hold up a checkpoint; a run that resumes sends what is missing."""

    def close(self) -> None:
        if self._sent is not None:
            self._sent.wait()
        self._client.set_terminated(self._id)


def _row(answer: Answer) -> list[str]:
    return [answer.id, answer.task, answer.instruction, answer.references[0], answer.answer]


def _ids(folder: RunFolder) -> dict[str, str]:
    return {key: str(value) for key, value in (folder.find_json(_IDS_FILE) or {}).items()}
