"""What is wrong with the choices of a pool's routers, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# From this share of the data-dependent router's choices on, it counts as collapsed.
_COLLAPSED = 0.95


def alarms(members: Sequence[str], datasets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say what is wrong with the choices, a sentence each; usually nothing.

    Collapsed: with top-K, the K members chosen most get over 95 % of the data-dependent router's choices, unless these
    are all members. Every task counts alike, so that one with many clips does not hide the others.

    Args:
        datasets: As in the report.
    """
    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for by_task in datasets.values():
        for task, summary in by_task.items():
            if summary["clips"]:
                tasks.setdefault(task, []).append(summary)
    if not tasks:
        return []
    load = {router: _mean_load(members, tasks, router) for router in ("dependent", "independent")}
    clips = sum(summary["clips"] for summaries in tasks.values() for summary in summaries)
    over = f"over {len(tasks)} task{'s' if len(tasks) > 1 else ''} ({clips} clips)"
    found = []
    total = sum(load["dependent"].values())
    favourites = sorted(members, key=lambda member: -load["dependent"][member])[: round(total)]
    share = sum(load["dependent"][member] for member in favourites) / total if total else 0.0
    if len(favourites) < len(members) and share > _COLLAPSED + 1e-9:
        found.append(
            f"The data-dependent router has collapsed: {100 * share:.3g} % of its choices {over} are "
            f"{' and '.join(favourites)}."
        )
    idle = [member for member in members if not load["dependent"][member] and not load["independent"][member]]
    if idle:
        found.append(f"Never chosen by either router {over}: {', '.join(idle)}.")
    return found


def _mean_load(
    members: Sequence[str], tasks: Mapping[str, Sequence[Mapping[str, Any]]], router: str
) -> dict[str, float]:
    """Share of clips each member was chosen for: over the clips of a task, then over tasks."""
    mean = dict.fromkeys(members, 0.0)
    for summaries in tasks.values():
        clips = sum(summary["clips"] for summary in summaries)
        for member in members:
            chosen = sum(summary[router]["load"][member] * summary["clips"] for summary in summaries)
            mean[member] += chosen / clips / len(tasks)
    return mean
