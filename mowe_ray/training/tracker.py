"""Metrics of a run: metrics.jsonl always, and the trackers that the configuration enables."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from mowe_ray.config.schema import TrackingSection
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.trackers.base import MetricTracker, Records, Waves
from mowe_ray.training.trackers.mlflow import Mlflow
from mowe_ray.training.trackers.tensorboard import TensorBoard
from mowe_ray.training.trackers.wandb import Wandb

_EVERY_S = 10.0  # between two writes to an object store, each of which is an object


class Tracker:
    """Writes one record a call to `metrics.jsonl` and to the trackers that are on.

    A resumed run drops the records after the step it resumes from, so each step stands there once.

    Attributes:
        validated: Step and source of the validations that an earlier start of the run has recorded.
        shows_media: Whether a tracker is on that takes pictures and audio.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        name: str,
        config: Mapping[str, Any],
        resume_step: int,
        tracking: TrackingSection,
        others: Sequence[MetricTracker] = (),
        warn: Callable[[str], object] = lambda line: None,
    ):
        """Open the trackers; only rank 0 may.

        Args:
            others: Get every record besides, also those of earlier starts; neither pictures nor audio is made for them.
            warn: Shows a line to the user: records that are damaged and left out, a tracker that fails.
        """
        self._folder, self._warn = folder, warn
        self._unwritten: list[str] = []
        self._writing, self._closed = threading.Lock(), threading.Event()
        self._failed: set[str] = set()
        folder.keep_lines_up_to("metrics.jsonl", resume_step, warn)
        validations = (record for record in self.records() if record["kind"] == "validation")
        self.validated = {(record["step"], record.get("source")) for record in validations}
        self._trackers: list[MetricTracker] = []
        for open_tracker in _openers(
            folder, tracking, name=name, config=config, resume_step=resume_step, records=self.records
        ):
            with self._tolerating():
                self._trackers.append(open_tracker())
        self.shows_media = bool(self._trackers)
        self._trackers += others
        for other, record in product(others, self.records()):
            other.log(record)
        # To an object store they go in a thread: a step does not wait for it.
        self._thread = None
        if folder.local_path("") is None:
            self._thread = threading.Thread(target=self._write_now_and_then, daemon=True, name="metrics")
            self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append `record`, which has a `step` and names its `kind`, to all enabled writers.

        NaN and infinities are written as null, for JSON has no others. A line that cannot be written, as on a full
        disk, is kept for the next time: metrics are no reason to stop training.
        """
        record = {key: _finite(value) for key, value in record.items()}
        self._unwritten.append(json.dumps(record, allow_nan=False) + "\n")
        if self._thread is None:
            with contextlib.suppress(OSError):  # the checkpoints on the same storage report it
                self._write()
        self._each(lambda tracker: tracker.log(record))

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        """Show a picture in the trackers."""
        self._each(lambda tracker: tracker.log_picture(name, step, png))

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        """Show answers in the trackers, with the audio of each by its id."""
        self._each(lambda tracker: tracker.log_samples(source, step, answers, waves))

    def _each(self, use: Callable[[MetricTracker], object]) -> None:
        for tracker in self._trackers:
            with self._tolerating():
                use(tracker)

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        """Log an error inside, once for each kind, and go on: a tracker is no reason to stop training."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each tracker raises its own
            kind = type(error).__name__
            if kind not in self._failed:
                self._failed.add(kind)
                self._warn(f"warning: a tracker failed, training goes on: {kind}: {str(error).partition(chr(10))[0]}")

    def records(self) -> list[dict[str, Any]]:
        """Return all records of the run, oldest first."""
        self._write()
        return self._folder.read_records("metrics.jsonl", "kind", "step")

    def flush(self) -> None:
        """Write what is not written yet, from any thread; before a checkpoint, so that no restored run misses it."""
        with contextlib.suppress(OSError):  # the checkpoints on the same storage report it
            self._write()
        self._each(lambda tracker: tracker.flush())

    def _write(self) -> None:
        with self._writing:
            if lines := self._unwritten[:]:  # a copy: the training thread may append meanwhile
                self._folder.append_text("metrics.jsonl", "".join(lines))
                del self._unwritten[: len(lines)]

    def _write_now_and_then(self) -> None:
        while not self._closed.wait(_EVERY_S):
            self.flush()

    def close(self) -> None:
        """Finish the trackers."""
        if self._thread is not None:
            self._closed.set()
            self._thread.join()
            self._write()
            self._folder.write_lines("metrics.jsonl", self._folder.read_lines("metrics.jsonl"))  # one file again
        self._each(lambda tracker: tracker.close())


def _openers(
    folder: RunFolder,
    tracking: TrackingSection,
    *,
    name: str,
    config: Mapping[str, Any],
    resume_step: int,
    records: Records,
) -> list[Callable[[], MetricTracker]]:
    """Return what opens each tracker that is on."""
    openers: list[Callable[[], MetricTracker]] = []
    if tracking.tensorboard:
        openers.append(lambda: TensorBoard(folder, resume_step, records))
    if tracking.wandb.mode != "off":
        openers.append(lambda: Wandb(folder, tracking, name, config, records))
    if (uri := tracking.mlflow) is not None:
        openers.append(lambda: Mlflow(folder, uri, name, config, records))
    return openers


def _finite(value: Any) -> Any:
    """Return `value` with None for every number in it that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
