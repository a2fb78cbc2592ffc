"""Each task of each source in a study's report: how much every point is better than the baseline, on the same clips."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from mowe_ray.evaluation.results import Interval
from mowe_ray.output.charts import Axis, IntervalRow, colour, escape, interval_rows, tag
from mowe_ray.output.html_page import section
from mowe_ray.sweeping.analysis.by_task import ALL_TASKS, ByTask, TaskRow, TaskScore
from mowe_ray.sweeping.analysis.points import Point, number
from mowe_ray.sweeping.trials import point_label, trial_name

_LABEL = 46


def task_section(found: ByTask) -> str:
    """Return the section; nothing where there are no two points to compare."""
    rows, shown = found.rows, found.points
    if not rows and not found.unanswered:
        return ""
    baseline = point_label(shown[0].values, _LABEL)
    seeds = max((row.seeds for row in rows), default=1)
    luck = f"clips and {seeds} seeds" if seeds > 1 else "clips; what another seed would change is not in it"
    note = (
        f"What each point scores more than {escape(baseline)}, with 95 % intervals over {luck}. A difference whose "
        "interval does not hold 0 is bold in the table, and its score stands before it."
    )
    drawn = _chart(rows, shown) + _table(rows, shown) if rows else ""
    return section("By source and task", drawn + "".join(_left_out(found)), note)


def _left_out(found: ByTask) -> Iterator[str]:
    """Yield a sentence for each task that cannot be compared."""
    for (source, task), numbers in found.unanswered.items():
        trials = ", ".join(trial_name(number) for number in numbers)
        yield tag("p", f"{escape(task)} of {escape(source)} is left out: {trials} left no readable answers to it.")


def _chart(rows: Sequence[TaskRow], shown: Sequence[Point]) -> str:
    """Draw the differences over all tasks of each source, of a source with one task on that."""
    several = {row.source for row in rows if row.task == ALL_TASKS}
    drawn = [
        IntervalRow(
            name=point_label(point.values, _LABEL),
            value=found.value,
            low=found.low,
            high=found.high,
            written=f"{found.value:+.3f}",
            tip=f"{point_label(point.values)} on {row.source}: {_with_bounds(found)}",
            colour=colour(place),
            more=f"[{found.low:+.3f}, {found.high:+.3f}]",
            group=f"{row.source}, {row.clips} clips",
        )
        for row in rows
        if row.task == ALL_TASKS or row.source not in several
        for place, point in enumerate(shown[1:])
        if (found := row.scores[point.number].difference) is not None
    ]
    axis = Axis.over([0.0, *(value for row in drawn for value in (row.low, row.high))])
    return interval_rows(drawn, axis, zero=True, ends=("← worse", "better →"))


def _table(rows: Sequence[TaskRow], shown: Sequence[Point]) -> str:
    labels = [point_label(point.values, _LABEL) for point in shown]
    heads = [
        ("source", False),
        ("task", False),
        ("clips", True),
        ("majority", True),
        *((name, True) for name in labels),
    ]
    head = tag("tr", *(tag("th", tag("button", escape(name)), class_="n" if n else None) for name, n in heads))
    body = [
        tag(
            "tr",
            tag("td", escape(row.source)),
            tag("td", escape(row.task or "all tasks")),
            tag("td", str(row.clips), class_="n", data_v=row.clips),
            tag("td", number(row.majority), class_="n", data_v=row.majority),
            *(_cell(row.scores[point.number]) for point in shown),
            class_="won" if row.task == ALL_TASKS else None,
        )
        for row in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def _cell(score: TaskScore) -> str:
    found = score.difference
    if found is None:
        return tag("td", number(score.mean), class_="n", data_v=score.mean)
    clear = found.low > 0 or found.high < 0
    written = f"{found.value:+.3f}"
    difference = tag("b", written) if clear else tag("small", written)
    return tag("td", f"{number(score.mean)} ", difference, class_="n", data_v=score.mean, data_tip=_with_bounds(found))


def _with_bounds(found: Interval) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def scores_csv(found: ByTask) -> str:
    """Return scores.csv: one row for each source, task and point, with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["source", "task", "clips", "majority", "point", "label", "seeds", "score", "difference", "low", "high"]
    )
    for row in found.rows:
        for point in found.points:
            score = row.scores[point.number]
            gain = score.difference
            numbers = [score.mean, *((gain.value, gain.low, gain.high) if gain else (None, None, None))]
            written = ["" if value is None else f"{value:.5f}" for value in numbers]
            label = point_label(point.values)
            writer.writerow(
                [
                    row.source,
                    row.task or "all",
                    row.clips,
                    f"{row.majority:.5f}",
                    point.number,
                    label,
                    row.seeds,
                    *written,
                ]
            )
    return buffer.getvalue()
