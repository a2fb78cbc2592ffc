"""The figures of a run as Ray's own metrics, for Prometheus: `cluster/grafana-dashboard.json` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


class RayMetrics:
    """Shows the newest records of a run through `ray.util.metrics`; a tracker like others, on rank 0."""

    def __init__(self, run: str):
        """Begin for the run of this name, which every figure carries as `run`."""
        self._run = {"run": run}
        self._gauges = {key: _gauge(*about) for key, about in _TRAINING.items()}
        self._load = _gauge("router_load", "Share of the clips that chose an encoder", "router", "encoder")
        self._score = _gauge("validation_score", "Score of a task on a validation source", "source", "task")
        self._restarts = _gauge("restarts", "Recoveries from failures")
        self._recoveries = 0
        self._restarts.set(0, self._run)

    def log(self, record: Record) -> None:
        """Show a record."""
        if record["kind"] == "train":
            for key, gauge in self._gauges.items():
                if isinstance(value := record.get(key), int | float):
                    gauge.set(value, self._run)
            self._show_routing(record.get("routing", {}))
        elif record["kind"] == "validation":
            for task, scores in record["tasks"].items():
                self._score.set(scores["score"], {**self._run, "source": record["source"], "task": task})
        elif record["kind"] == "recovery":
            self._recoveries += 1
            self._restarts.set(self._recoveries, self._run)

    def _show_routing(self, routing: Mapping[str, Any]) -> None:
        for router, found in routing.items():
            for encoder, share in found["load"].items():
                self._load.set(share, {**self._run, "router": router, "encoder": encoder})

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        """Nothing: there are only numbers."""

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        """Nothing, as well."""

    def flush(self) -> None:
        """Nothing: Ray collects them itself."""

    def close(self) -> None:
        """Nothing, as well."""


def _gauge(name: str, about: str, *tags: str) -> Gauge:
    return Gauge(f"mowe_{name}", about, ("run", *tags))
