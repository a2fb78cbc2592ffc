"""An evaluation's report: one HTML file with conclusions, scores, and routing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mowe_ray.evaluation.report import samples
from mowe_ray.evaluation.report.charts import difference_chart, legend, quality_charts
from mowe_ray.evaluation.report.router_charts import (
    ablation_charts,
    drift,
    independent_choice,
    is_on,
    load_bars,
    member_legend,
)
from mowe_ray.evaluation.report.samples import confusion_tables, samples_view
from mowe_ray.evaluation.report.summary import (
    WORDS,
    MetricRow,
    alarms,
    bounds,
    compared_models,
    group_rows,
    headline,
    listed,
    metric_rows,
    not_computed,
    score,
    signed,
    typeset,
)
from mowe_ray.evaluation.results import EvaluatedModel, Evaluation, TaskScores
from mowe_ray.output.charts import escape, tag
from mowe_ray.output.html_page import page, section, tiles
from mowe_ray.output.terminal import amount

_CERTAINTY = (
    "[low, high] is a 95 % bootstrap interval over samples. A difference is taken on the samples both models answered, "
    "paired: both are resampled together. It counts as one where its interval does not hold 0; of twenty intervals "
    "without any difference behind them, one will still not hold it.",
    "The intervals say how far other samples of the same data would move a score. They do not say how far another seed "
    "of training would: for that, train and evaluate several.",
)


_CONFUSION = (
    "Samples by the label that is right, a row each, and the one that was answered. The shade is the share of the row; "
    "a number that is underlined shows its samples."
)


def _samples_note(evaluation: Evaluation) -> str:
    shown, audible = len(evaluation.samples), sum(sample.clip is not None for sample in evaluation.samples)
    total = sum(max(scores.samples for scores in same) for same in _by_test_set(evaluation))
    which = f"The {shown} most telling of {total}" if shown < total else f"All {shown}"
    return (
        f"{which}, {audible} of them with sound. In an answer, what the nearest reference does not have is shaded, and "
        "what it lacks is struck out. Dots name the encoders that ran, and how sure the router was of them."
    )


def _by_test_set(evaluation: Evaluation) -> list[list[TaskScores]]:
    found: dict[tuple[str, str], list[TaskScores]] = {}
    for model in evaluation.models:
        for scores in model.scores:
            found.setdefault((scores.dataset, scores.task), []).append(scores)
    return list(found.values())


def report(evaluation: Evaluation) -> str:
    """Return report.html, for one model or several side by side."""
    rows = metric_rows(evaluation)
    names = [model.name for model in evaluation.models]
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    return page(
        f"Evaluation of {', '.join(names)}",
        _header(evaluation, names, datasets),
        section("Scores", score_table(evaluation, rows), _table_note(evaluation)),
        section("Scores by group", group_table(evaluation), "The main metric of samples that are alike in something."),
        *_comparison(evaluation, rows),
        section("What was mistaken for what", confusion_tables(evaluation), _CONFUSION),
        section("Samples", samples_view(evaluation), _samples_note(evaluation), name="samples"),
        *(part(model, len(names) > 1) for model in evaluation.models for part in (_routers, _ablation)),
        section("What is missing", _list(not_computed(evaluation))),
        section("How certain this is", "".join(tag("p", text) for text in _CERTAINTY)) if rows else "",
        style=samples.STYLE if evaluation.samples else "",
        script=samples.SCRIPT if evaluation.samples else "",
    )


def _header(evaluation: Evaluation, names: list[str], datasets: list[str]) -> str:
    first, *rest = headline(evaluation)
    subject = f"{listed(names, 5)} on {listed(datasets, 4)}" if datasets else listed(names, 5)
    return tag(
        "header",
        tag("p", "Evaluation", class_="study"),
        tag("h1", escape(subject)),
        tag("p", escape(first), class_="answer"),
        _list(rest),
        _alarms(alarms(evaluation)),
        _tiles(evaluation),
        tag("p", escape(f"Measured on {evaluation.device}."), class_="note", style="margin-top:8px"),
    )


def _list(sentences: Sequence[str]) -> str:
    return tag("ul", *(tag("li", escape(sentence)) for sentence in sentences), class_="more") if sentences else ""


def _alarms(sentences: Sequence[str]) -> str:
    return "".join(
        tag("p", tag("b", "Warning: "), escape(sentence), class_="alarm", role="alert") for sentence in sentences
    )


_ELSEWHERE = "runs at a server"


def _tiles(evaluation: Evaluation) -> str:
    """Costs: a tile for each number of one model, a tile for each of several models."""
    if len(evaluation.models) == 1:
        return tiles([(number, name, more) for number, name, more in _costs(evaluation.models[0])])
    return tiles(
        [
            (model.name, *([f"{number} {name}" for number, name, _ in _costs(model) if number != "–"] or [_ELSEWHERE]))
            for model in evaluation.models
        ]
    )


def _costs(model: EvaluatedModel) -> list[tuple[str, str, str]]:
    factor = model.real_time_factor
    speed = "" if not factor else f"{1 / factor:.3g} s of audio a second"
    pool = f"with a pool of {len(model.members)}" if model.members else "no pool"
    return [
        (amount(model.stored), "parameters", _ELSEWHERE if model.stored is None else pool),
        (amount(model.active), "of them run for a clip", "on average"),
        ("–" if model.gflops is None else f"{model.gflops:.3g}", "GFLOPs per clip", "of 30 s"),
        ("–" if factor is None else f"{factor:.3g}", "real-time factor", speed and f"one worker processes {speed}"),
    ]


def _table_note(evaluation: Evaluation) -> str:
    marked = " A difference is called better or worse only where its interval does not hold 0."
    return (
        "Scores with their 95 % interval; a data set's first metric is its main one. Most frequent answer: what always "
        "giving it would score." + (marked if compared_models(evaluation) else "")
    )


def _comparison(evaluation: Evaluation, rows: Sequence[MetricRow]) -> list[str]:
    if not compared_models(evaluation):
        return []
    base = escape(evaluation.baseline)
    chart, quality = difference_chart(evaluation, rows), quality_charts(evaluation, rows)
    several = legend(evaluation) if len(evaluation.models) > 2 else ""
    return [
        section(
            f"Difference to {base}",
            several + chart if chart else "",
            f"On each main metric, with its 95 % interval. Dots to the right are better than {base}: where lower is "
            "better the chart is turned round, the numbers are not. Hollow: cannot be told apart.",
        ),
        section(
            "Quality against cost",
            legend(evaluation) + quality if quality else "",
            "What a clip costs each model, and what it gets for that; bars are 95 % intervals.",
        ),
    ]


def _routers(model: EvaluatedModel, named: bool) -> str:
    report = model.router_report
    if not report or not report["datasets"]:
        return ""
    course = drift(report)
    body = [
        _alarms(report["alarms"]),
        tag("p", escape(independent_choice(report))),
        "" if is_on(report, "dependent") else tag("p", "The data-dependent router is off."),
        member_legend(report["members"]),
        load_bars(report),
        tag("h3", "Over training: mean probability of each member, and entropy", style="margin-top:26px") + course
        if course
        else "",
    ]
    note = (
        "Share of clips that each member of the pool is chosen for, by the router that looks at the clip. Overlap: how "
        "much of that the data-independent router runs anyway. Entropy in nats: 0 is sure, "
        f"{report['entropy_of_uniform_nats']:.2f} undecided."
    )
    return section(f"What the routers{f' of {escape(model.name)}' if named else ''} chose", "".join(body), note)


def _ablation(model: EvaluatedModel, named: bool) -> str:
    chart = ablation_charts(model)
    note = (
        "Change of the main metric, with its 95 % interval, when the routers cannot choose a member and take the next "
        "best. To the right it helps: quality is lost without it. To the left it harms: quality is gained without it. "
        "Hollow: cannot be told from no change. Numbers keep the metric's own direction. CUR, the conditional "
        "utilization rate, is the share of the performance that is lost without a member; the information gap lies "
        "between the largest and the smallest (arXiv 2507.03262)."
    )
    if model.shapley:
        note += " A Shapley value is what a member adds, averaged over the orders in which the members may join."
    return section(f"What each encoder{f' of {escape(model.name)}' if named else ''} is worth", chart, note)


def score_table(evaluation: Evaluation, rows: Sequence[MetricRow]) -> str:
    """Return the table: models side by side, differences to the baseline, a group of rows per test set."""
    if not rows:
        return ""
    models, compared = (
        [model.name for model in evaluation.models],
        [model.name for model in compared_models(evaluation)],
    )
    majority = any(row.majority is not None for row in rows)
    heads = [tag("th", name) for name in ("data", "metric")] + [tag("th", "samples", class_="n")]
    heads += [tag("th", escape(name), class_="n") for name in models]
    heads += [tag("th", "most frequent<br>answer", class_="n")] if majority else []
    heads += [tag("th", f"{escape(name)} against<br>{escape(evaluation.baseline)}", class_="n") for name in compared]
    groups = [
        tag("tbody", *_rows(list(group), models, compared, majority))
        for _, group in groupby(rows, key=lambda row: row.test_set)
    ]
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), *groups, class_="sets"), class_="wide")


def group_table(evaluation: Evaluation) -> str:
    """Return the table of the main metric by category, difficulty and the like; empty where nothing is grouped."""
    rows, models = group_rows(evaluation), [model.name for model in evaluation.models]
    if not rows:
        return ""
    heads = [tag("th", name) for name in ("data", "by", "")] + [tag("th", "samples", class_="n")]
    heads += [tag("th", escape(name), class_="n") for name in models]
    bodies = []
    for (dataset, task, by), grouped in groupby(rows, key=lambda row: (row.dataset, row.task, row.name)):
        group = list(grouped)
        spanning = [tag("th", escape(dataset), tag("small", escape(task)), rowspan=len(group))]
        spanning += [tag("th", escape(by), tag("small", escape(group[0].title)), rowspan=len(group))]
        lines = [
            tag(
                "tr",
                *(spanning if i == 0 else []),
                tag("td", escape(row.value)),
                tag("td", str(row.samples), class_="n"),
                *(
                    _number(score(row.scores[name].value), bounds(row.scores[name]))
                    if name in row.scores
                    else _number("–")
                    for name in models
                ),
            )
            for i, row in enumerate(group)
        ]
        bodies.append(tag("tbody", *lines))
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), *bodies, class_="sets"), class_="wide")


def _rows(group: list[MetricRow], models: list[str], compared: list[str], majority: bool) -> list[str]:
    metric = group[0]
    task = tag("small", escape(metric.task)) if metric.task != metric.dataset else ""
    head = tag("th", escape(metric.dataset), task, scope="rowgroup", rowspan=len(group))
    rows = []
    for i, metric in enumerate(group):
        cells = [
            tag("td", tag("b", escape(metric.title)), tag("small", WORDS[metric.better])),
            tag("td", _samples(metric), class_="n"),
            *(_score(metric, name) for name in models),
            *([_number(score(metric.majority))] if majority else []),
            *(_difference(metric, name) for name in compared),
        ]
        rows.append(tag("tr", *([head] if i == 0 else []), *cells, class_="first" if metric.main else None))
    return rows


def _samples(row: MetricRow) -> str:
    counts = sorted(set(row.samples.values()))
    return "–".join(map(str, [counts[0], *counts[1:][-1:]]))


def _number(written: str, *below: str, kind: str = "n") -> str:
    return tag(
        "td", tag("b", escape(typeset(written))), *(tag("small", escape(typeset(b))) for b in below), class_=kind
    )


def _score(row: MetricRow, model: str) -> str:
    interval = row.scores.get(model)
    return _number(score(interval.value), bounds(interval)) if interval else _number("–")


def _difference(row: MetricRow, model: str) -> str:
    interval = row.differences.get(model)
    if not interval:
        return _number("–")
    verdict = row.verdict(model)
    return _number(f"{signed(interval.value)} {verdict}".rstrip(), bounds(interval), kind=f"n {verdict}".rstrip())
