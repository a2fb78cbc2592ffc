"""The files of an evaluation: scores.json and the router report of each model, and the report over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mowe_ray.evaluation.report.page import report
from mowe_ray.evaluation.results import EvaluatedModel, Evaluation
from mowe_ray.evaluation.routing.report import draw
from mowe_ray.evaluation.targets import Target, evaluation_folder, report_folder


def write_results(evaluation: Evaluation, targets: Sequence[Target], out: str | None) -> dict[str, Any]:
    """Write everything; returns the result of the command.

    Args:
        targets: The models, in the order of those evaluated.
        out: As in the configuration.
    """
    result: dict[str, Any] = {"report": "", "baseline": evaluation.baseline, "models": {}}
    for model, target in zip(evaluation.models, targets, strict=True):
        folder = evaluation_folder(target, out)
        differences = [one for one in evaluation.differences if one.model == model.name]
        content = asdict(model) | {"baseline": evaluation.baseline, "differences": [asdict(d) for d in differences]}
        routing = content.pop("router_report")
        folder.write_json("scores.json", content)
        if routing is not None:
            folder.write_json("router_report.json", routing)
            folder.write_bytes("router_report.png", draw(routing))
        result["models"][model.name] = {"evaluation": folder.url, "scores": _main_scores(model)}
    folder = report_folder(targets, out)
    folder.write_text("report.html", report(evaluation))
    return {**result, "report": folder.path("report.html")}


def _main_scores(model: EvaluatedModel) -> dict[str, dict[str, float]]:
    """Return the main score by DATASET/TASK."""
    return {f"{one.dataset}/{one.task}": {one.main: round(one.scores[one.main].value, 2)} for one in model.scores}
