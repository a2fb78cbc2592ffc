"""An evaluation as a table for the terminal."""

from __future__ import annotations

import io

from mowe_ray.evaluation.comparison import Line, alarms, lines, not_computed, others
from mowe_ray.evaluation.labels import bounds, score, signed
from mowe_ray.evaluation.results import Evaluation
from mowe_ray.output.text import write_table


def table(evaluation: Evaluation) -> str:
    """Return the main metric of each dataset and task, models side by side; what is missing or wrong below."""
    found = [line for line in lines(evaluation) if line.main]
    models, compared = [model.name for model in evaluation.models], [model.name for model in others(evaluation)]
    head = ["dataset", "task", "metric", "better", "samples", "majority", *models]
    head += [f"{name} - {evaluation.baseline}" for name in compared]
    out = io.StringIO()
    if found:
        write_table(out, [head, *(_row(line, models, compared) for line in found)])
        out.write("  [low, high]: 95 % interval over samples; majority: always the most frequent answer\n")
    else:
        out.write("  nothing was scored\n")
    for warning in alarms(evaluation):
        out.write(f"  warning: {warning}\n")
    for missing in not_computed(evaluation):
        out.write(f"  note: {missing}\n")
    return out.getvalue()


def _row(line: Line, models: list[str], compared: list[str]) -> list[str]:
    scores = [
        f"{score(line.scores[name].value)} {bounds(line.scores[name])}" if name in line.scores else "-"
        for name in models
    ]
    gains = [
        f"{signed(line.differences[name].value)} {bounds(line.differences[name])} {line.verdict(name)}".rstrip()
        if name in line.differences
        else "-"
        for name in compared
    ]
    counts = sorted(set(line.samples.values()))
    samples = "-".join(map(str, [counts[0], *counts[1:][-1:]]))
    return [line.dataset, line.task, line.title, line.better, samples, score(line.majority), *scores, *gains]
