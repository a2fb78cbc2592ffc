"""Charts of what the routers of a study's trials chose."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mowe_ray.output.colours import chips, colour
from mowe_ray.output.svg import escape, tag, text
from mowe_ray.sweeping.labels import point_label
from mowe_ray.sweeping.schema import POOL_KEY
from mowe_ray.sweeping.trials import Trial

_BAR = 18
_MOST_ROWS = 20
Routing = Mapping[str, Any]


def families(trials: Sequence[Trial], routings: Mapping[int, Routing]) -> dict[str, str]:
    """Return the encoder each pool member is an instance of: the longest name of a pool that its own begins with."""
    encoders = sorted({name for trial in trials for name in trial.values.get(POOL_KEY, [])}, key=len, reverse=True)
    members = dict.fromkeys(member for routing in routings.values() for member in routing["members"])
    return {m: next((e for e in encoders if re.match(re.escape(e) + r"(\W|_|\d|$)", m)), m) for m in members}


def load_bars(ordered: Sequence[Trial], routings: Mapping[int, Routing], winners: set[int]) -> str:
    """Draw for each trial, in the given order, which share of the choices each member got, by both routers."""
    rows = [trial for trial in ordered if trial.number in routings]
    if not rows:
        return ""
    family = families(ordered, routings)
    colours = {name: colour(i) for i, name in enumerate(dict.fromkeys(family.values()))}
    legend = chips((c, name) for name, c in colours.items()) if len(colours) > 1 else ""
    head = "".join(tag("span", title, class_="head") for title in ("trial", "per clip", "for all clips"))
    written = [_load_row(t, routings[t.number], family, colours, t.number in winners) for t in rows]
    grid = tag("div", head, *written[:_MOST_ROWS], class_="loads")
    if len(written) > _MOST_ROWS:
        rest = tag("div", *written[_MOST_ROWS:], class_="loads")
        grid += tag("details", tag("summary", f"{len(written) - _MOST_ROWS} more trials"), rest)
    return legend + grid


def _load_row(trial: Trial, routing: Routing, family: dict[str, str], colours: dict[str, str], wins: bool) -> str:
    label = f"{trial.number}  {point_label(trial.values)}"
    name = tag("span", escape(label), class_="name best" if wins else "name", title=label)
    bars = []
    for router, words in (("dependent", "data-dependent router"), ("independent", "data-independent router")):
        shares = mean_load(routing, router)
        total = sum(shares.values())
        if not total:
            bars.append(tag("span", "off", class_="note"))
            continue
        segments, before = [], 0.0
        for member, load in shares.items():
            width = 100 * load / total
            segments.append(_segment(member, before, width, load, words, colours[family[member]]))
            before += width
        bars.append(tag("svg", *segments, class_="plot bar", height=_BAR, role="img", aria_label=f"{words}, {label}"))
    return name + "".join(bars)


def _segment(member: str, before: float, width: float, load: float, words: str, fill: str) -> str:
    inside = text(member, 5, 13, class_="inside") if width > 12 else ""
    return tag(
        "svg",
        tag("rect", width="100%", height=_BAR, style=f"fill:{fill}", class_="segment"),
        inside,
        x=f"{before:.2f}%",
        width=f"{width:.2f}%",
        height=_BAR,
        data_tip=f"{member}\nchosen for {100 * load:.0f} % of clips by the {words}",
    )


def mean_load(routing: Routing, router: str) -> dict[str, float]:
    """Return the share of clips each member was chosen for, mean over tasks."""
    tasks = [values[router]["load"] for values in routing["validation"].values()]
    return {member: sum(load[member] for load in tasks) / len(tasks) if tasks else 0.0 for member in routing["members"]}


def heat_map(routings: Sequence[Routing]) -> str:
    """Draw, as a table, which share of each task's clips the data-dependent router sent to each member.

    Args:
        routings: Of trials with equal pools; their mean is shown.
    """
    if not routings or not routings[0]["validation"]:
        return ""
    if not any(sum(mean_load(routing, "dependent").values()) for routing in routings):
        return ""  # a router that is off
    members, tasks = routings[0]["members"], list(routings[0]["validation"])
    head = tag("tr", tag("th"), *(tag("th", escape(member), scope="col") for member in members))
    rows = []
    for task in tasks:
        loads = [routing["validation"][task]["dependent"]["load"] for routing in routings]
        shares = [sum(load[member] for load in loads) / len(loads) for member in members]
        rows.append(tag("tr", tag("th", escape(task), scope="row"), *map(_cell, shares)))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="heat")


def _cell(share: float) -> str:
    strength = 60 * min(1.0, max(0.0, share))  # no stronger, so that the text stays readable on it
    style = f"background:color-mix(in oklab, var(--accent) {strength:.0f}%, var(--paper))"
    return tag("td", f"{100 * share:.0f} %", style=style)
