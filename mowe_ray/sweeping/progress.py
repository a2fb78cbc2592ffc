"""The table of a study that is under way: trials by state, the best so far, the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mowe_ray.output.terminal import Pace, duration, make_table
from mowe_ray.sweeping.analysis.points import by_status
from mowe_ray.sweeping.schema import ObjectiveSection
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import Trial, TrialStatus, point_label

_STATES: tuple[TrialStatus, ...] = ("running", "waiting", "finished", "stopped", "failed")
# Where no table can be drawn again in its place, a line says as much, so often.
_LINE_EVERY_S = 30.0


class StudyProgress:
    """Shows a study on stderr: a table that stays in its place on a terminal, lines elsewhere."""

    def __init__(self, log: Callable[[str], object]):
        """Show nothing yet; `log` prints a line where there is no terminal."""
        self._log = log
        self._console = Console(file=sys.stderr)
        self._live: Live | None = None
        self._pace: Pace | None = None
        self._last_line_s, self._last_ended = 0.0, 0

    def show(self, study: Study) -> None:
        """Show the study as it is now."""
        done = _share_done(study.trials.values())
        if self._pace is None:
            self._pace = Pace(study.expected_trials, done)
        self._pace.done = done
        left_s = self._pace.left_s
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=False)
                self._live.start()
            self._live.update(table(study, left_s), refresh=True)
            return
        ended, now = sum(trial.over for trial in study.trials.values()), time.monotonic()
        if now - self._last_line_s > _LINE_EVERY_S or ended != self._last_ended:
            self._last_line_s, self._last_ended = now, ended
            self._log(summary(study, left_s))

    def close(self) -> None:
        """Leave the last table where it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def summary(study: Study, left_s: float | None) -> str:
    """Return the state of the study in one line."""
    states = by_status(study.trials.values())
    counts = ", ".join(f"{states[state]} {state}" for state in _STATES if states[state])
    total = study.expected_trials
    of = "" if total is None else f" of {total}"
    best = best_trial(
        (trial for trial in study.trials.values() if not study.sweep.is_supernet(trial.values)), study.sweep.objective
    )
    best_so_far = "" if best is None else f"  best {best.name} {_value(best, study)} ({point_label(best.values)})"
    left = "" if left_s is None else f"  {duration(left_s)} left"
    return f"{len(study.trials)}{of} trials: {counts}{best_so_far}{left}"


def table(study: Study, left_s: float | None) -> Table:
    """Return the running trials and the best five as a table under the summary."""
    running = [trial for trial in study.trials.values() if trial.status == "running"]
    ended = sorted(
        (trial for trial in study.trials.values() if trial.over),
        key=lambda trial: _rank(trial, study.sweep.objective),
    )
    rows = [
        [trial.name, trial.status, f"{trial.percent:.0f} %", _value(trial, study), point_label(trial.values)]
        for trial in [*running, *ended[:5]]
    ]
    drawn = make_table(rows, ["trial", "state", "done", study.sweep.objective.metric, "values"])
    drawn.title, drawn.title_justify, drawn.title_style = summary(study, left_s), "left", ""
    return drawn


def best_trial(trials: Iterable[Trial], objective: ObjectiveSection) -> Trial | None:
    """Return the trial with the best last validation; None before the first."""
    validated = [trial for trial in trials if trial.objective(objective.metric) is not None]
    return min(validated, key=lambda trial: _rank(trial, objective), default=None)


def _rank(trial: Trial, objective: ObjectiveSection) -> float:
    value = trial.objective(objective.metric)
    if value is None:
        return float("inf")
    return -value if objective.mode == "max" else value


def _value(trial: Trial, study: Study) -> str:
    value = trial.objective(study.sweep.objective.metric)
    return "" if value is None else f"{value:.3f}"


def _share_done(trials: Iterable[Trial]) -> float:
    return sum(1.0 if trial.over else trial.percent / 100 for trial in trials)
