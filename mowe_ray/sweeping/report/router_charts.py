"""Charts of the routing of a study's trials."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mowe_ray.output.charts import BarSegment, chips, colour, escape, stacked_bar, tag
from mowe_ray.sweeping.schema import POOL_KEY
from mowe_ray.sweeping.trials import Trial, point_label

_MOST_ROWS = 20  # that are seen at once
_MOST_DRAWN = 200
RouterReport = Mapping[str, Any]


def families(trials: Sequence[Trial], routings: Mapping[int, RouterReport]) -> dict[str, str]:
    """Return the encoder each pool member is an instance of: the longest name of a pool that its own begins with."""
    encoders = sorted({name for trial in trials for name in trial.values.get(POOL_KEY, [])}, key=len, reverse=True)
    members = dict.fromkeys(member for routing in routings.values() for member in routing["members"])
    return {m: next((e for e in encoders if re.match(re.escape(e) + r"(\W|_|\d|$)", m)), m) for m in members}


def load_bars(ordered: Sequence[Trial], routings: Mapping[int, RouterReport], winners: set[int]) -> str:
    """Draw for the first trials of the given order which share of the choices each member got, by both routers."""
    rows = [trial for trial in ordered if trial.number in routings]
    if not rows:
        return ""
    family = families(ordered, routings)
    colours = {name: colour(i) for i, name in enumerate(dict.fromkeys(family.values()))}
    legend = chips((c, name) for name, c in colours.items()) if len(colours) > 1 else ""
    head = "".join(tag("span", title, class_="head") for title in ("trial", "per clip", "for all clips"))
    written = [_load_row(t, routings[t.number], family, colours, t.number in winners) for t in rows[:_MOST_DRAWN]]
    grid = tag("div", head, *written[:_MOST_ROWS], class_="loads")
    if len(written) > _MOST_ROWS:
        rest = tag("div", *written[_MOST_ROWS:], class_="loads")
        grid += tag("details", tag("summary", f"{len(written) - _MOST_ROWS} more trials"), rest)
    if len(rows) > len(written):
        grid += tag("p", f"{len(rows) - len(written)} more have theirs in router_report.json", class_="note")
    return legend + grid


def _load_row(trial: Trial, routing: RouterReport, family: dict[str, str], colours: dict[str, str], wins: bool) -> str:
    label = f"{trial.number}  {point_label(trial.values)}"
    name = tag("span", escape(label), class_="name best" if wins else "name", title=label)
    bars = []
    for router, words in (("dependent", "data-dependent router"), ("independent", "data-independent router")):
        parts = [
            BarSegment(member, load, colours[family[member]], _tip(member, load, words))
            for member, load in mean_load(routing, router).items()
        ]
        is_on = any(part.size for part in parts)
        bars.append(stacked_bar(parts, f"{words}, {label}") if is_on else tag("span", "off", class_="note"))
    return name + "".join(bars)


def _tip(member: str, load: float, words: str) -> str:
    return f"{member}\nchosen for {100 * load:.0f} % of clips by the {words}"


def mean_load(routing: RouterReport, router: str) -> dict[str, float]:
    """Return the share of clips each member was chosen for, mean over datasets and tasks."""
    loads = [summary[router]["load"] for summary in by_task(routing).values()]
    return {member: sum(load[member] for load in loads) / len(loads) if loads else 0.0 for member in routing["members"]}


def by_task(routing: RouterReport) -> dict[str, Any]:
    """Return the entries of a router report by task: a task that several datasets have stands under DATASET/TASK."""
    tasks = [task for summaries in routing["datasets"].values() for task in summaries]
    return {
        task if tasks.count(task) == 1 else f"{dataset}/{task}": summary
        for dataset, summaries in routing["datasets"].items()
        for task, summary in summaries.items()
    }


def heat_map(routings: Sequence[RouterReport]) -> str:
    """Draw, as a table, which share of each task's clips the data-dependent router sent to each member.

    Args:
        routings: Of trials with equal pools; their mean is shown.
    """
    if not any(sum(mean_load(routing, "dependent").values()) for routing in routings):
        return ""  # a router that is off
    members, tasks = routings[0]["members"], [by_task(routing) for routing in routings]
    head = tag("tr", tag("th"), *(tag("th", escape(member), scope="col") for member in members))
    rows = []
    for task in tasks[0]:
        loads = [summaries[task]["dependent"]["load"] for summaries in tasks]
        shares = [sum(load[member] for load in loads) / len(loads) for member in members]
        rows.append(tag("tr", tag("th", escape(task), scope="row"), *map(_cell, shares)))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="heat")


def _cell(share: float) -> str:
    strength = 60 * min(1.0, max(0.0, share))  # no stronger, so that the text stays readable on it
    style = f"background:color-mix(in oklab, var(--accent) {strength:.0f}%, var(--paper))"
    return tag("td", f"{100 * share:.0f} %", style=style)
