"""What the routers learned: choices by task and over training, as JSON and as one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # workers have no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from mowe_ray.evaluation.routing_sums import RoutingSums


def router_report(
    members: Sequence[str], by_task: Mapping[str, RoutingSums], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return loads, mean probabilities and entropies by task, and their course over training.

    Args:
        members: Names of the M pool members, in pool order.
        by_task: Routing sums over the final validation.
        history: Records with `step` and `routing` (a `RoutingSums.summary`), oldest first.
    """
    return {
        "members": list(members),
        "entropy_of_uniform_nats": math.log(len(members)),
        "validation": {task: sums.summary(list(members)) for task, sums in sorted(by_task.items())},
        "training": [{"step": record["step"], **record["routing"]} for record in history],
    }


def draw(report: Mapping[str, Any]) -> bytes:
    """Draw a report as PNG: who is chosen for which task, and how the choices settled."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    _draw_loads(axes[0], report)
    _draw_history(axes[1], report)
    _draw_entropies(axes[2], report)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _draw_loads(axis: Axes, report: Mapping[str, Any]) -> None:
    tasks, members = list(report["validation"]), report["members"]
    bottom = [0.0] * len(tasks)
    for member in members:
        shares = [report["validation"][task]["dependent"]["load"][member] for task in tasks]
        axis.bar(tasks, shares, bottom=bottom, label=member)
        bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
    axis.set(title="Chosen per clip (data-dependent), validation", ylabel="share of clips", ylim=(0, None))
    axis.legend(loc="lower right", fontsize="small")


def _draw_history(axis: Axes, report: Mapping[str, Any]) -> None:
    steps = [record["step"] for record in report["training"]]
    for i, member in enumerate(report["members"]):
        for router, style in (("dependent", "-"), ("independent", "--")):
            values = [record[router]["probability"][member] for record in report["training"]]
            axis.plot(steps, values, style, color=f"C{i}", label=member if style == "-" else None)
    axis.set(title="Mean probability (solid: dependent, dashed: independent)", xlabel="step", ylim=(0, 1))
    axis.legend(fontsize="small")


def _draw_entropies(axis: Axes, report: Mapping[str, Any]) -> None:
    steps = [record["step"] for record in report["training"]]
    for router, style in (("dependent", "-"), ("independent", "--")):
        axis.plot(steps, [record[router]["entropy"] for record in report["training"]], style, color="k", label=router)
    axis.axhline(report["entropy_of_uniform_nats"], color="0.7", linestyle=":", label="undecided")
    axis.set(title="Router entropy (nats)", xlabel="step", ylim=(0, None))
    axis.legend(fontsize="small")
