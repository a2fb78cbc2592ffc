"""One trial of a study: a complete training run, driven from inside a Ray Tune trial.

Tune's function trainables can deadlock over a nested Ray Train run and give Tune no checkpoints (Ray 2.60); this is a
class: a step waits for the next validation of the run, which trains on meanwhile in a thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune import PlacementGroupFactory
from ray.util.placement_group import remove_placement_group

from mowe_ray.config import RunConfig
from mowe_ray.config.keys import set_key
from mowe_ray.distributed.ray_internals import HEAD_NODE
from mowe_ray.distributed.ray_train.coordinator import start_coordinator
from mowe_ray.distributed.ray_train.driver import is_exact, train
from mowe_ray.distributed.ray_train.published import SourcesOf
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.trials import Validation, history, joined, objective
from mowe_ray.training.checkpoint.layout import committed_steps, copy_checkpoint_from
from mowe_ray.training.sample_audit import SAMPLES_FILE

LOG_FILE = "log.txt"
_POINTER = "pointer.json"
# How long a run may take to save when it is stopped; then its workers are killed.
_STOP_S = 90.0
# How long the checkpoint of a validated step may take to be written.
_CHECKPOINT_S = 120.0


def driver_resources(concurrent: int | None) -> PlacementGroupFactory:
    """Returns what a trial's driver reserves: no CPU, but a part of the head node, which is no spot machine.

    Args:
        concurrent: Trials at a time, if Ray is to limit them: paused trials reserve nothing, so that a scheduler that
            pauses cannot deadlock. The rest is for the actors that Ray Train starts there, 0.001 a run.
    """
    share = 0.0001 if concurrent is None else int(10_000 / (concurrent + 0.5)) / 10_000
    return PlacementGroupFactory([{HEAD_NODE: share}])


class TrialTrainable(ray.tune.Trainable):
    """Runs the configuration in the folder that has the trial's name.

    Its `config` holds `study`, the URL of the study's folder, `objective`, the metric to report, `limit_s`, the time
    limit in seconds, `plugins`, which were imported on arrival, and dotted keys that a scheduler may change meanwhile.
    """

    def setup(self, config: dict[str, Any], sources_of: SourcesOf) -> None:
        """See the class; called by Tune in the trial's process.

        Args:
            sources_of: Indexes the data of the trials; those that have equal data share it.
        """
        self._sources_of = sources_of
        study, self._metric, self._limit_s = config["study"], config["objective"], config["limit_s"]
        self._folder = RunFolder(study, self.trial_name)
        self._changes = changes_of(config)
        self._coordinator = start_coordinator()
        self._thread: threading.Thread | None = None
        self._result: dict[str, Any] | Exception | None = None
        self._alarms: list[str] = []
        self._began = time.monotonic()

    def step(self) -> dict[str, Any]:
        """Returns the next validation, with `done` when the run has ended.

        Raises:
            RuntimeError: The run failed, or took too long.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="run")
            self._thread.start()
        event = self._next_validation()
        if event is None or event["progress"] >= 1:
            self._thread.join()
            if isinstance(self._result, Exception):
                raise RuntimeError("\n  ".join([str(self._result), *self._alarms[-1:]])) from self._result
            if event is None:  # the run had ended before: read its files
                last = history(self._folder).validations[-1:]
                return self._report(last[0] if last else None, percent=100.0, done=True)
        return self._report(
            joined(event["step"], event["sources"]), percent=100.0 * event["progress"], done=event["progress"] >= 1
        )

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes a pointer to the checkpoint of the last validation, which Tune may give to another trial."""
        deadline, wanted = time.monotonic() + _CHECKPOINT_S, self._validated_step
        while not (steps := [step for step in committed_steps(self._folder) if step >= wanted]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no checkpoint of step {wanted} within {_CHECKPOINT_S:g} s")
            time.sleep(0.2)
        pointer = {"folder": self._folder.url, "step": steps[0]}
        Path(checkpoint_dir, _POINTER).write_text(json.dumps(pointer), encoding="utf-8")

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Continues from the checkpoint of another trial; the run resumes from its own newest one by itself."""
        pointer = json.loads(Path(checkpoint_dir, _POINTER).read_text(encoding="utf-8"))
        if pointer["folder"] != self._folder.url:
            storage, _, name = pointer["folder"].rpartition("/")
            copy_checkpoint_from(self._folder, RunFolder(storage, name), pointer["step"])
            self._log(f"continuing from step {pointer['step']} of {name}, with {self._changes}")

    def cleanup(self) -> None:
        """Stops the run after a checkpoint, and releases the resources of its workers."""
        if self._thread is not None and self._thread.is_alive():
            ray.get(self._coordinator.stop.remote())
            self._thread.join(_STOP_S)
        if held := ray.get(self._coordinator.placement_group.remote()):
            remove_placement_group(held)

    def _run(self) -> None:
        try:
            # The process of an attempt before may still be saving, or about to be killed.
            self._result = train(
                self._configured(), self._log, self._coordinator, patience_s=2 * _STOP_S, sources_of=self._sources_of
            )
            if not is_exact(self._result):
                raise RuntimeError(f"samples: {self._result['samples']}; {SAMPLES_FILE} and {LOG_FILE} have which")
        except Exception as error:  # noqa: BLE001 - raised by `step`, in Tune's thread
            self._result = error
        self._coordinator.add_validation.remote(None)

    def _configured(self) -> RunConfig:
        """Returns the run's configuration, after writing the scheduler's changes to its file."""
        resolved = self._folder.read_json("config.json")
        for dotted, value in self._changes.items():
            set_key(resolved, dotted.split("."), value)
        config = RunConfig.model_validate(resolved)
        self._folder.write_json("config.json", config.model_dump(mode="json"))
        return config

    def _next_validation(self) -> dict[str, Any] | None:
        left_s = self._limit_s - (time.monotonic() - self._began)
        try:
            event: dict[str, Any] | None = ray.get(self._coordinator.next_validation.remote(), timeout=max(0.0, left_s))
        except ray.exceptions.GetTimeoutError as error:
            raise RuntimeError(
                f"the trial took longer than {self._limit_s / 3600:.3g} hours (budget.trial_hours)"
            ) from error
        return event

    def _report(self, validation: Validation | None, *, percent: float, done: bool) -> dict[str, Any]:
        value = None if validation is None else objective(self._metric, validation.loss, validation.tasks)
        if validation is None or value is None:
            raise RuntimeError(
                f"the run's validation has no {self._metric} (objective.metric): "
                "give data.validation a source with that task"
            )
        self._validated_step = validation.step
        return {
            "objective": value,
            "percent": percent,
            "step": validation.step,
            "loss": validation.loss,
            "tasks": validation.tasks,
            "done": done,
        }

    def _log(self, line: str) -> None:
        if line.startswith("error:"):  # a hang ends a worker, and only this line names the place
            self._alarms.append(line)
        with contextlib.suppress(OSError):  # the disk is full, and the line no reason to end the run
            self._folder.append_text(LOG_FILE, f"{time.strftime('%H:%M:%S')} {line}\n")


def changes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dotted keys of a Tune trial's configuration."""
    return {key: value for key, value in config.items() if "." in key}
