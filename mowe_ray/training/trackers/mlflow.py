"""MLflow."""

from __future__ import annotations

import io
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.trackers.base import (
    COLUMNS,
    IDS_FILE,
    ContinuedTracker,
    Record,
    Records,
    Waves,
    flatten,
    group_of,
    numbers_of,
    read_ids,
    row_of,
)

_EXPERIMENT = "mowe_ray"  # of MLflow, unless its own MLFLOW_EXPERIMENT_NAME names another
_MOST_AT_ONCE = 100  # parameters that MLflow takes in one request
_FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in its names of metrics
_LONGEST = 500  # characters of one of them


class Mlflow(ContinuedTracker):
    """A run of MLflow, through its own client: a server, or a folder as its URI."""

    def __init__(self, folder: RunFolder, uri: str, name: str, config: Mapping[str, Any], records: Records):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing phones home
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # Records arrive in order, and all have when the last has: a run that resumes looks for the last alone.
        os.environ.setdefault("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")
        from mlflow import MlflowClient  # optional

        self._client = MlflowClient(uri)
        self._sent: Any = None
        ids = read_ids(folder)
        if "mlflow" not in ids:
            ids["mlflow"] = self._create(name, config)
            folder.write_json(IDS_FILE, ids)
        self._id = ids["mlflow"]
        self._client.update_run(self._id, status="RUNNING")
        super().__init__(self._client.get_run(self._id).data.metrics)
        self._logged_waves: set[tuple[str, str]] = set()  # source and id
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

        if not self.is_new(record):
            return
        step, now_ms = record["step"], int(time.time() * 1000)
        values = {**numbers_of(record), f"{group_of(record)}/step": step}
        metrics = [Metric(_FORBIDDEN.sub("_", name), float(value), now_ms, step) for name, value in values.items()]
        # In a thread of the client: a step does not wait for a server.
        self._sent = self._client.log_batch(self._id, metrics=metrics, synchronous=False)

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        self._artifact(f"{name}-{step:08d}.png", png)

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        for name in [name for name in waves if (source, name) not in self._logged_waves]:
            self._logged_waves.add((source, name))
            file = io.BytesIO()
            soundfile.write(file, waves[name], SAMPLE_RATE, format="FLAC")
            self._artifact(f"samples/{source}/{name}.flac", file.getvalue())
        table = {"columns": COLUMNS, "data": [row_of(answer) for answer in answers]}
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
