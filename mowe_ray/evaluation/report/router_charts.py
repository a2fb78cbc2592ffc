"""Charts of a model's routing: its loads, its course over training, and the ablation of each pool member."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mowe_ray.evaluation.report.summary import bounds, gain, is_finite, signed, test_set_names, typeset, verdict
from mowe_ray.evaluation.results import Ablation, EvaluatedModel, Interval, Shapley
from mowe_ray.output.charts import (
    PLAIN,
    Axis,
    BarSegment,
    IntervalRow,
    Series,
    chips,
    colour,
    escape,
    interval_rows,
    line_chart,
    stacked_bar,
    tag,
)
from mowe_ray.output.html_page import folded

_MOST_FIGURES = 6
_SHARES = Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
_ROUTERS = {"dependent": "Data-dependent router", "independent": "Data-independent router"}
Report = Mapping[str, Any]


def member_legend(members: Sequence[str]) -> str:
    """Return a legend of the members' colours."""
    return chips((colour(i), member) for i, member in enumerate(members))


def summaries(report: Report) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    """Yield (dataset, task) and its entry of the report."""
    for dataset, tasks in report["datasets"].items():
        for task, summary in tasks.items():
            yield (dataset, task), summary


def is_on(report: Report, router: str) -> bool:
    """Whether a router chose any member."""
    return any(sum(summary[router]["load"].values()) for _, summary in summaries(report))


def load_bars(report: Report) -> str:
    """Draw for each dataset and task which share of its clips the data-dependent router sends to each member."""
    entries = list(summaries(report))
    names = test_set_names(pair for pair, _ in entries)
    heads = [("", "head"), ("share of clips", "head"), ("overlap", "head n"), ("entropy", "head n")]
    rows = [tag("span", title, class_=kind) for title, kind in heads]
    if is_on(report, "independent"):
        rows += _load_row("same for every clip", entries[0][1], "independent", None)
    if is_on(report, "dependent"):
        for pair, summary in entries:
            rows += _load_row(names[pair], summary, "dependent", summary["overlap"])
    return tag("div", *rows, class_="loads told")


def _load_row(name: str, summary: Mapping[str, Any], router: str, overlap: float | None) -> list[str]:
    routing, words = summary[router], _ROUTERS[router].lower()
    parts = [
        BarSegment(member, load, colour(i), _tip(name, member, load, routing["probability"][member], words))
        for i, (member, load) in enumerate(routing["load"].items())
    ]
    label = f"{name}: " + ", ".join(f"{part.name} {100 * part.size:.0f} %" for part in parts)
    return [
        tag("span", escape(name), class_="name", title=f"{name}, {summary['clips']} clips"),
        stacked_bar(parts, label) if any(part.size for part in parts) else tag("span", "no clips", class_="note"),
        tag("span", "" if overlap is None else f"{100 * overlap:.0f} %", class_="n"),
        tag("span", f"{routing['entropy']:.2f}", class_="n"),
    ]


def _tip(name: str, member: str, load: float, probability: float, words: str) -> str:
    return f"{name}\n{member}: chosen for {100 * load:.1f} % of clips by the {words}, mean weight {probability:.2f}"


def independent_choice(report: Report) -> str:
    """Describe which members the data-independent router runs, and with what weights."""
    if not is_on(report, "independent"):
        return "The data-independent router is off."
    routing = next(
        summary["independent"] for _, summary in summaries(report) if sum(summary["independent"]["load"].values())
    )
    weights = sorted(routing["probability"].items(), key=lambda item: -item[1])
    chosen = " and ".join(f"{member} (weight {w:.2f})" for member, w in weights if routing["load"][member])
    rest = ", ".join(f"{member} {w:.2f}" for member, w in weights if not routing["load"][member])
    return f"The data-independent router runs {chosen} for every clip{f'; it gives {rest}' if rest else ''}."


def drift(report: Report) -> str:
    """Draw how the mean probabilities and the entropies of both routers moved over training."""
    history = report["training"]
    if len(history) < 2:
        return ""
    on = [router for router in _ROUTERS if any(record[router]["entropy"] for record in history)]
    figures = [
        _figure(
            _ROUTERS[router],
            [
                Series(member, [(r["step"], r[router]["probability"][member]) for r in history], colour(i))
                for i, member in enumerate(report["members"])
            ],
            _SHARES,
        )
        for router in on
    ]
    uniform = report["entropy_of_uniform_nats"]
    colours = ["var(--ink)", "var(--muted)"][: len(on)]
    courses = [
        Series(router, [(r["step"], r[router]["entropy"]) for r in history], fill)
        for router, fill in zip(on, colours, strict=True)
    ]
    courses.append(Series("undecided", [(r["step"], uniform) for r in (history[0], history[-1])], PLAIN, dashed=True))
    ticks = tuple(tick for tick in Axis.over([0.0, uniform], count=3).ticks if tick >= 0)
    legend = chips(zip(colours, on, strict=True))
    entropies = _figure("Entropy, in nats", courses, Axis(0.0, 1.1 * uniform or 1.0, ticks), legend)
    return tag("div", *figures, entropies, class_="three") if on else ""


def _figure(title: str, series: Sequence[Series], y: Axis, legend: str = "") -> str:
    return tag("figure", tag("h3", title), legend, line_chart(title, series, x_label="training step", y=y))


def ablation_charts(model: EvaluatedModel) -> str:
    """Draw the loss on each test set without each member: the further right, the more the member contributes."""
    scored = {(task.dataset, task.task): task for task in model.scores}
    lost: dict[tuple[str, str], list[tuple[Ablation, Interval]]] = {}
    for ablation in model.ablation:
        task = scored.get((ablation.dataset, ablation.task))
        if task is not None and ablation.metric in task.better and is_finite(ablation.change):
            lost.setdefault((ablation.dataset, ablation.task), []).append(
                (ablation, _lost(ablation, task.better[ablation.metric]))
            )
    colours = {member: colour(i) for i, member in enumerate(model.members)}
    figures = []
    for pair, name in test_set_names(lost).items():
        first, _ = lost[pair][0]
        better = scored[pair].better[first.metric]
        note = f"change of {scored[pair].titles[first.metric]} without it, {first.samples} samples"
        shares = [one for one in model.shapley if (one.dataset, one.task) == pair and is_finite(one.value)]
        rows = [
            _ablation_row(ablation, interval, colours[ablation.member], "left out" if shares else "")
            for ablation, interval in lost[pair]
        ]
        rows += [_shapley_row(one, better, colours[one.member]) for one in shares]
        # An axis of its own for each: points of CIDEr-D and of accuracy are no common scale.
        axis = Axis.over([0.0, *(end for row in rows for end in (row.low, row.high))], count=4)
        chart = interval_rows(rows, axis, zero=True, ends=("← harms", "helps →"))
        rates = _utilization([ablation for ablation, _ in lost[pair]])
        caption = tag("p", escape(note), class_="note")
        figures.append(tag("figure", tag("h3", escape(name)), caption, chart, rates, class_="effect"))
    return folded(figures, _MOST_FIGURES, "two")


def _lost(ablation: Ablation, better: str) -> Interval:
    gained = gain(ablation.change, better)
    return Interval(-gained.value, -gained.high, -gained.low)


def _utilization(ablations: Sequence[Ablation]) -> str:
    """Write the conditional utilization rates of a test set, and the gap between them."""
    rates = {one.member: one.utilization for one in ablations if one.utilization is not None}
    if not rates:
        return ""
    each = ", ".join(f"{member} {100 * rate:.0f} %" for member, rate in rates.items())
    gap = 100 * (max(rates.values()) - min(rates.values()))
    return tag("p", escape(typeset(f"CUR: {each}; information gap {gap:.0f} points.")), class_="note")


def _shapley_row(one: Shapley, better: str, fill: str) -> IntervalRow:
    gained = gain(one.value, better)
    value, interval = typeset(signed(one.value.value)), typeset(bounds(one.value))
    how = f"all {one.subsets} subsets" if one.is_exact else f"{one.subsets} subsets that were drawn"
    return IntervalRow(
        one.member,
        gained.value,
        gained.low,
        gained.high,
        written=value,
        more=interval,
        tip=f"{one.member} adds {value}\n{interval}\nmean over {how} of the pool",
        colour=fill,
        strong=bool(verdict(gained)),
        hollow=not verdict(gained),
        group="Shapley value",
    )


def _ablation_row(ablation: Ablation, lost: Interval, fill: str, group: str) -> IntervalRow:
    clear = {"better": "worse without it", "worse": "better without it", "": "cannot be told from no change"}[
        verdict(lost)
    ]
    change = f"{signed(ablation.change.value)} {bounds(ablation.change)}"
    return IntervalRow(
        ablation.member,
        lost.value,
        lost.low,
        lost.high,
        written=typeset(signed(ablation.change.value)),
        more=typeset(bounds(ablation.change)),
        tip=f"without {ablation.member}\n{typeset(change)}\n{clear}",
        colour=fill,
        strong=bool(verdict(lost)),
        hollow=not verdict(lost),
        group=group,
    )
