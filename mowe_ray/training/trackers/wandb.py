"""Weights & Biases."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mowe_ray.config.schema import TrackingSection
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
    group_of,
    numbers_of,
    read_ids,
    row_of,
)


class Wandb(ContinuedTracker):
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
        ids = read_ids(folder)
        known = "wandb" in ids
        self._id = ids.setdefault("wandb", secrets.token_hex(8))
        folder.write_json(IDS_FILE, ids)
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
        if self.is_new(record):
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
        table = self._wandb.Table(columns=["audio", *COLUMNS])
        for answer in answers:
            table.add_data(self._wandb.Audio(waves[answer.id], sample_rate=SAMPLE_RATE), *row_of(answer))
        self._log(f"samples/{source}", step, {f"samples/{source}/table": table})

    def flush(self) -> None:
        """Nothing: its service process has what was logged."""

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # until its service has ended, its files may grow
        if self._scratch is not None:
            self._folder.upload(self._scratch / "wandb", "wandb")
            shutil.rmtree(self._scratch, ignore_errors=True)  # its service may still hold a log in it
