"""The files a study leaves in its folder: results.csv, best.yaml, report.html."""

from __future__ import annotations

from typing import Any

from mowe_ray.sweeping.report.page import report
from mowe_ray.sweeping.report.tables import results_csv, summary
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import history, run_folder


def write_results(study: Study, elapsed_s: float | None = None) -> dict[str, Any]:
    """Write what is known so far; returns the result of the command.

    Args:
        elapsed_s: How long the study took, if it has ended.
    """
    folder, trials = study.folder, list(study.trials.values())
    found = summary(study.sweep, trials)
    best_yaml = None
    if found["best"] is not None:
        best = next(trial for trial in trials if trial.name == found["best"]["trials"][0])
        best_yaml = study.best_config(best).to_yaml()
        folder.write_text("best.yaml", best_yaml)
    histories = {trial.number: history(run_folder(folder, trial)) for trial in trials}
    folder.write_text("results.csv", results_csv(study.sweep, trials))
    folder.write_text("report.html", report(study.sweep, trials, histories, best_yaml, elapsed_s))
    files = {"report": folder.path("report.html"), "best_config": folder.path("best.yaml") if best_yaml else None}
    return {"sweep": folder.url, **files, **found}
