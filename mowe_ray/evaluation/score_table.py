"""The table of all scores in an evaluation's report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mowe_ray.evaluation.comparison import Line, others
from mowe_ray.evaluation.labels import WORDS, bounds, score, signed, typeset
from mowe_ray.evaluation.results import Evaluation
from mowe_ray.output.svg import escape, tag


def score_table(evaluation: Evaluation, found: Sequence[Line]) -> str:
    """Return the table: models side by side, differences to the baseline, a group of rows per test set."""
    if not found:
        return ""
    models, compared = [model.name for model in evaluation.models], [model.name for model in others(evaluation)]
    majority = any(line.majority is not None for line in found)
    heads = [tag("th", name) for name in ("data", "metric")] + [tag("th", "samples", class_="n")]
    heads += [tag("th", escape(name), class_="n") for name in models]
    heads += [tag("th", "most frequent<br>answer", class_="n")] if majority else []
    heads += [tag("th", f"{escape(name)} against<br>{escape(evaluation.baseline)}", class_="n") for name in compared]
    groups = [
        tag("tbody", *_rows(list(group), models, compared, majority))
        for _, group in groupby(found, key=lambda line: line.test_set)
    ]
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), *groups, class_="sets"), class_="wide")


def _rows(group: list[Line], models: list[str], compared: list[str], majority: bool) -> list[str]:
    line = group[0]
    task = tag("small", escape(line.task)) if line.task != line.dataset else ""
    head = tag("th", escape(line.dataset), task, scope="rowgroup", rowspan=len(group))
    rows = []
    for i, line in enumerate(group):
        cells = [
            tag("td", tag("b", escape(line.title)), tag("small", WORDS[line.better])),
            tag("td", _samples(line), class_="n"),
            *(_score(line, name) for name in models),
            *([_number(score(line.majority))] if majority else []),
            *(_difference(line, name) for name in compared),
        ]
        rows.append(tag("tr", *([head] if i == 0 else []), *cells, class_="first" if line.main else None))
    return rows


def _samples(line: Line) -> str:
    counts = sorted(set(line.samples.values()))
    return "–".join(map(str, [counts[0], *counts[1:][-1:]]))


def _number(written: str, *below: str, kind: str = "n") -> str:
    return tag(
        "td", tag("b", escape(typeset(written))), *(tag("small", escape(typeset(b))) for b in below), class_=kind
    )


def _score(line: Line, model: str) -> str:
    found = line.scores.get(model)
    return _number(score(found.value), bounds(found)) if found else _number("–")


def _difference(line: Line, model: str) -> str:
    found = line.differences.get(model)
    if not found:
        return _number("–")
    verdict = line.verdict(model)
    return _number(f"{signed(found.value)} {verdict}".rstrip(), bounds(found), kind=f"n {verdict}".rstrip())
