"""Metric writers: metrics.jsonl always; TensorBoard and wandb when the configuration enables them."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from mowe_ray.output.run_folder import RunFolder

_EVERY_S = 10.0  # between two writes to an object store, each of which is an object


class Tracker:
    """Writes one record a call to `metrics.jsonl` and to the trackers that are on.

    A resumed run drops the records after the step it resumes from, so each step stands there once.

    Attributes:
        validated: Step and source of the validations that an earlier start of the run has recorded.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        name: str,
        config: Mapping[str, Any],
        resume_step: int,
        wandb_mode: Literal["off", "offline", "online"],
        wandb_project: str,
        wandb_group: str | None,
        tensorboard: bool,
        warn: Callable[[str], object] | None = None,
    ):
        """Open the trackers; only rank 0 may.

        Args:
            warn: Shows a line to the user about records that are damaged and left out.
        """
        self._folder = folder
        self._unwritten: list[str] = []
        self._writing, self._closed = threading.Lock(), threading.Event()
        # To an object store they go in a thread: a step does not wait for it.
        self._thread = None
        if folder.local_path("") is None:
            self._thread = threading.Thread(target=self._write_now_and_then, daemon=True, name="metrics")
            self._thread.start()
        self._latest_step = resume_step
        folder.keep_lines_up_to("metrics.jsonl", resume_step, warn)
        validations = (record for record in self.records() if record["kind"] == "validation")
        self.validated = {(record["step"], record.get("source")) for record in validations}
        self._scratch = Path(tempfile.mkdtemp(prefix="mowe_ray_tracking_"))
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional: slow to import

            self._tensorboard = SummaryWriter(str(self._scratch / "tensorboard"))
            # What a run that was interrupted had written went with its machine; metrics.jsonl has it all.
            for record in self.records():
                self._add_scalars(record)
        self._wandb = None
        if wandb_mode != "off":
            import wandb  # optional: starts a service process

            self._wandb = wandb.init(
                mode=wandb_mode,
                project=wandb_project,
                group=wandb_group,
                name=name,
                id=name if wandb_group is None else f"{wandb_group}-{name}",  # trials of two studies share names
                resume="allow",
                dir=str(self._scratch),
                config=dict(config),
            )

    def log(self, record: Mapping[str, Any]) -> None:
        """Append `record`, which has a `step` and names its `kind`, to all enabled writers.

        NaN and infinities are written as null, for JSON has no others. A line that cannot be written, as on a full
        disk, is kept for the next time: metrics are no reason to stop training.
        """
        record = {key: _finite(value) for key, value in record.items()}
        self._unwritten.append(json.dumps(record, allow_nan=False) + "\n")
        if self._thread is None:
            self.flush()
        if self._tensorboard is not None:
            self._add_scalars(record)
        if self._wandb is not None:
            # wandb takes no earlier step than its last, and an async validation may arrive late; `numbers` has its own.
            self._latest_step = max(self._latest_step, record["step"])
            self._wandb.log(_numbers(record), step=self._latest_step)

    def _add_scalars(self, record: Mapping[str, Any]) -> None:
        assert self._tensorboard is not None
        for key, value in _numbers(record).items():
            self._tensorboard.add_scalar(key, value, record["step"])

    def records(self) -> list[dict[str, Any]]:
        """Return all records of the run, oldest first."""
        self._write()
        return self._folder.read_records("metrics.jsonl", "kind", "step")

    def flush(self) -> None:
        """Write what is not written yet, from any thread; before a checkpoint, so that no restored run misses it."""
        with contextlib.suppress(OSError):  # the checkpoints on the same storage report it
            self._write()

    def _write(self) -> None:
        with self._writing:
            if lines := self._unwritten[:]:  # a copy: the training thread may append meanwhile
                self._folder.append_text("metrics.jsonl", "".join(lines))
                del self._unwritten[: len(lines)]

    def _write_now_and_then(self) -> None:
        while not self._closed.wait(_EVERY_S):
            self.flush()

    def close(self) -> None:
        """Finish the trackers and move their files into the run folder."""
        if self._thread is not None:
            self._closed.set()
            self._thread.join()
            self._write()
            self._folder.write_lines("metrics.jsonl", self._folder.read_lines("metrics.jsonl"))  # one file again
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._folder.upload(self._scratch / "tensorboard", "tensorboard")
        if self._wandb is not None:
            self._wandb.finish()
            self._folder.upload(self._scratch / "wandb", "wandb")
        shutil.rmtree(self._scratch, ignore_errors=True)  # wandb's own service may still hold a log in it


def _numbers(record: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the numbers of a record by their names in trackers."""
    return {f"{record['kind']}/{key}": v for key, v in flatten(record).items() if isinstance(v, int | float)}


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _finite(value: Any) -> Any:
    """Return `value` with None for every number in it that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
