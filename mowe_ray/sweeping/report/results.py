"""The results of a study: the files in its folder, the summary that ends the command, the table for the terminal."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mowe_ray.output.terminal import amount, format_table
from mowe_ray.sweeping.analysis.by_task import ByTask, compared, scores_by_task
from mowe_ray.sweeping.analysis.calibration import Calibration, calibration
from mowe_ray.sweeping.analysis.conclusions import answer
from mowe_ray.sweeping.analysis.points import (
    Point,
    best,
    by_status,
    counts,
    finite,
    metric_label,
    number,
    pareto_front,
    plus_minus,
    points,
    ranked,
)
from mowe_ray.sweeping.clip_scores import ClipScores
from mowe_ray.sweeping.one_shot import load_logme, load_supernets
from mowe_ray.sweeping.report.by_task import scores_csv
from mowe_ray.sweeping.report.page import report
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.study import KeptStudy, Study, best_config
from mowe_ray.sweeping.trials import History, Trial, entry_label, entry_name, history, run_folder

# Seconds between two versions of the results while a study goes on.
_EVERY_S = 60.0


class ResultsWriter:
    """Writes results.csv, report.html and, once there is a winner, best.yaml; while the study goes on, in a thread.

    What an ended trial has left is read once.
    """

    def __init__(self, study: Study | KeptStudy):
        """Write nothing yet; there may be results of an earlier start."""
        self._study = study
        self._clips: ClipScores | None = None
        self._histories: dict[int, History] = {}
        self._ended, self._written = 0, -math.inf
        self._thread = threading.Thread()

    def update(self) -> None:
        """Begin to write, if a trial has ended and the last version is old enough."""
        ended = sum(trial.over for trial in self._study.trials.values())
        if ended == self._ended or self._thread.is_alive() or time.monotonic() - self._written < _EVERY_S:
            return
        self._ended, self._written = ended, time.monotonic()
        self._thread = threading.Thread(target=self._try, args=(self._trials(),), daemon=True, name="results")
        self._thread.start()

    def write(self, elapsed_s: float | None = None) -> dict[str, Any]:
        """Write the results as they are now; returns the result of the command.

        Args:
            elapsed_s: How long the study took, if it has ended.
        """
        if self._thread.is_alive():
            self._thread.join()
        trials = self._trials()
        result = self._write(trials, elapsed_s)
        clips = self._clips_of(trials)
        if not clips.is_saved:  # once, as it grows with every trial
            clips.save(self._study.folder)
        return result

    def _trials(self) -> list[Trial]:
        return list(self._study.trials.values())

    def _try(self, trials: Sequence[Trial]) -> None:
        with contextlib.suppress(OSError):  # the disk is full: at the next trial's end
            self._write(trials, None)

    def _write(self, trials: Sequence[Trial], elapsed_s: float | None) -> dict[str, Any]:
        study, folder = self._study, self._study.folder
        supernets = load_supernets(study.sweep, folder, trials)
        one_shot = calibration(study.space, trials, supernets, load_logme(folder))
        result = summary(study.sweep, trials, one_shot)
        best_yaml = None
        if result["best"] is not None:
            winner = next(trial for trial in trials if trial.name == result["best"]["trials"][0])
            best_yaml = best_config(study.space, winner).to_yaml()
            folder.write_text("best.yaml", best_yaml)
        by_task = self._by_task(trials)
        histories = {trial.number: self._history(trial) for trial in trials if trial.status != "waiting"}
        folder.write_text("results.csv", results_csv(study.sweep, trials))
        if by_task.rows:
            folder.write_text("scores.csv", scores_csv(by_task))
        html = report(study.sweep, trials, histories, best_yaml, elapsed_s, one_shot, by_task)
        folder.write_text("report.html", html)
        files = {"report": folder.path("report.html"), "best_config": folder.path("best.yaml") if best_yaml else None}
        return {"sweep": folder.url, **files, **result}

    def _by_task(self, trials: Sequence[Trial]) -> ByTask:
        """Compare the points on equal clips."""
        measured = points(self._study.sweep, trials)
        return scores_by_task(compared(measured, ranked(self._study.sweep, measured)), self._clips_of(trials))

    def _clips_of(self, trials: Sequence[Trial]) -> ClipScores:
        """Return what trials scored on each clip; what one has answered is read once."""
        if self._clips is None:
            self._clips = ClipScores.load(self._study.folder)
        self._clips.add(self._study.folder, trials)
        return self._clips

    def _history(self, trial: Trial) -> History:
        if trial.number in self._histories:
            return self._histories[trial.number]
        found = history(run_folder(self._study.folder, trial)).thinned()
        if trial.over:
            self._histories[trial.number] = found
        return found


def summary(config: SweepConfig, trials: Sequence[Trial], one_shot: Calibration | None = None) -> dict[str, Any]:
    """Return the result of a study as plain values, ready for JSON."""
    measured = points(config, trials)
    winner = best(config, measured)
    return {
        "metric": config.objective.metric,
        "best": winner and _described(winner),
        "front": [_described(point) for point in pareto_front(config, measured)] if config.objective.against else None,
        "points": len(measured),
        "trials": by_status(trials),
        **({"one_shot": one_shot and asdict(one_shot)} if config.search.kind == "oneshot" else {}),
        "answer": answer(config, trials, one_shot),
    }


def _described(point: Point) -> dict[str, Any]:
    return {
        "point": point.number,
        "values": point.values,
        "mean": point.mean,
        "stderr": point.error,
        "stderr_from": point.error_from,
        "spread": point.spread,
        "seeds": [trial.seed for trial in point.trials],
        "trials": [trial.name for trial in point.trials],
        "active_parameters": point.cost.active if point.cost else None,
        "gflops": point.cost.gflops if point.cost else None,
    }


def results_csv(config: SweepConfig, trials: Sequence[Trial]) -> str:
    """Return one row a trial, with a header; what is unknown is empty."""
    tasks = sorted({task for trial in trials for task in trial.tasks})
    rows = [_row(config, trial, tasks) for trial in sorted(trials, key=lambda trial: trial.number)]
    buffer = io.StringIO()
    header = _row(config, Trial(0, 0, 0, {}), tasks)
    writer = csv.DictWriter(buffer, list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _row(config: SweepConfig, trial: Trial, tasks: Sequence[str]) -> dict[str, Any]:
    cost = trial.cost
    return {
        "number": trial.number,
        "point": trial.point,
        "seed": trial.seed,
        "status": trial.status,
        **{name: _exact(trial.values.get(name)) for name in config.entries},
        "objective": finite(trial.objective(config.objective.metric)),
        "loss": finite(trial.loss),
        **{f"score.{task}": finite(trial.tasks.get(task, {}).get("score")) for task in tasks},
        **{f"majority.{task}": finite(trial.tasks.get(task, {}).get("majority")) for task in tasks},
        "stored_parameters": cost and cost.stored,
        "active_parameters": cost and cost.active,
        "gflops": cost and cost.gflops,
        "steps": trial.step,
        "percent": trial.percent,
        "attempts": trial.attempts,
        "wall_s": round(trial.wall_s, 1),
        "device_s": round(trial.device_s, 1),
        "error": " ".join(trial.error.split()) if trial.error else None,
    }


def _exact(value: Any) -> Any:
    return value if value is None or isinstance(value, float) else entry_label(value)


def table(config: SweepConfig, trials: Sequence[Trial], width: int | None = None) -> str:
    """Return the points as lines, the best first, then those that are not complete; see `format_table`."""
    measured = points(config, trials)
    names = list(config.space)
    header = ["point", *map(entry_name, names), metric_label(config.objective.metric), "spread", "active", "trials"]
    rows = [_cells(config, point) for point in [*ranked(config, measured), *(p for p in measured if not p.complete)]]
    return format_table(rows, header, right={0, len(header) - 3, len(header) - 2}, width=width)


def _cells(config: SweepConfig, point: Point) -> list[str]:
    values = [entry_label(point.values[name]) if name in point.values else "–" for name in config.space]
    mean, spread = plus_minus(point.mean, point.error), number(point.spread)
    active = amount(point.cost.active if point.cost else None)
    return [str(point.number), *values, mean, spread, active, counts(by_status(point.trials))]
