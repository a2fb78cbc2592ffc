"""The figures of a run as Ray's own metrics, for Prometheus: `cluster/grafana-dashboard.json` shows them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ray.util.metrics import Gauge

from mowe_ray.evaluation.predictions import Answer
from mowe_ray.training.trackers.base import Record, Waves

# Of a training record, by its key; Prometheus shows them as `ray_mowe_NAME`.
_TRAINING = {
    "step": ("step", "Optimizer steps finished"),
    "loss": ("loss", "Loss, averaged over training.log_every steps, like all that follows"),
    "learning_rate": ("learning_rate", "Learning rate, but for parts that have their own"),
    "step_s": ("step_seconds", "Time of a step, in seconds"),
    "audio_s_per_s": ("audio_seconds_per_second", "Seconds of audio trained on in a second, all workers together"),
    "data_wait_share": ("data_wait_ratio", "Share of the time that rank 0 waited for data"),
    "bad_samples": ("bad_samples", "Unusable samples found so far"),
    "skipped_steps": ("skipped_steps", "Steps left out, as loss or gradient was not finite"),
}

_EVERY_S = 2.0  # Ray exports every ten seconds, unless told otherwise


class RayMetrics:
    """Shows the newest records of a run through `ray.util.metrics`; a tracker like others, on rank 0.

    Ray exports a value once after it was set. So a thread sets all of them again, however long a step takes.
    """

    def __init__(self, run: str):
        """Begin for the run of this name, which every figure carries as `run`."""
        self._run = run
        self._gauges = {key: _gauge(*about) for key, about in _TRAINING.items()}
        self._load = _gauge("router_load", "Share of the clips that chose an encoder", "router", "encoder")
        self._score = _gauge("validation_score", "Score of a task on a validation source", "source", "task")
        self._restarts = _gauge("restarts", "Recoveries from failures")
        self._values: dict[tuple[Gauge, tuple[tuple[str, str], ...]], float] = {}
        self._recoveries = 0
        self._set(self._restarts, 0)
        self._closed = threading.Event()
        threading.Thread(target=self._set_again, daemon=True, name="ray_metrics").start()

    def log(self, record: Record) -> None:
        """Show a record."""
        if record["kind"] == "train":
            for key, gauge in self._gauges.items():
                if isinstance(value := record.get(key), int | float):
                    self._set(gauge, value)
            for router, found in record.get("routing", {}).items():
                for encoder, share in found["load"].items():
                    self._set(self._load, share, router=router, encoder=encoder)
        elif record["kind"] == "validation":
            for task, scores in record["tasks"].items():
                self._set(self._score, scores["score"], source=record["source"], task=task)
        elif record["kind"] == "recovery":
            self._recoveries += 1
            self._set(self._restarts, self._recoveries)

    def _set(self, gauge: Gauge, value: float, **tags: str) -> None:
        tags["run"] = self._run
        self._values[gauge, tuple(tags.items())] = value
        gauge.set(value, tags)

    def _set_again(self) -> None:
        while not self._closed.wait(_EVERY_S):
            for (gauge, tags), value in list(self._values.items()):
                gauge.set(value, dict(tags))

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        """Nothing: there are only numbers."""

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        """Nothing, as well."""

    def flush(self) -> None:
        """Nothing: Ray collects them itself."""

    def close(self) -> None:
        """Stop to show them."""
        self._closed.set()


def _gauge(name: str, about: str, *tags: str) -> Gauge:
    return Gauge(f"mowe_{name}", about, ("run", *tags))
