"""The page of a run, or of several laid over each other: curves, events and what differs, from the files of a run.

It is written while the run goes on, by a thread of its driver, which otherwise waits: no step pays for it.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mowe_ray.evaluation.report.summary import listed
from mowe_ray.output.charts import Axis, Series, chips, colour, escape, line_chart, tag
from mowe_ray.output.html_page import page, section, tiles
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import duration
from mowe_ray.training.run_records import Record, Run, course, read_run

PAGE = "report.html"
_EVERY_S = 30.0  # between two versions of the page of a run that goes on
_REMOTE_EVERY_S = 120.0  # likewise on an object store, from where all records are read again
_SHARE = Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0))
_MOST_EVENTS = 40
_ROUTERS = {"dependent": "Data-dependent router", "independent": "Data-independent router"}
_PLACES = ("name", "storage")  # keys that say where a run is, not what it is


@contextmanager
def page_while_training(folder: RunFolder, log: Callable[[str], object]) -> Iterator[None]:
    """Keep `report.html` of a run up to date inside, and write its last version at the end.

    Args:
        log: Told, once, of a page that cannot be written: that is no reason to end a run.
    """
    ended = threading.Event()
    warned: list[str] = []

    def write() -> None:
        try:
            folder.write_text(PAGE, run_page([read_run(folder)]))
        except Exception as error:  # noqa: BLE001 - each file system has errors of its own
            if not warned:
                warned.append(str(error))
                log(f"warning: {folder.path(PAGE)} cannot be written: {error}")

    def keep() -> None:
        write()
        while not ended.wait(_EVERY_S if folder.local_path("") is not None else _REMOTE_EVERY_S):
            write()

    thread = threading.Thread(target=keep, daemon=True, name="run page")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_EVERY_S)
        if not thread.is_alive():  # else the storage hangs
            write()


def run_page(runs: Sequence[Run]) -> str:
    """Return the page of one run, or of several compared."""
    colours = [colour(i) for i in range(len(runs))]
    names = _names(runs)
    legend = chips(zip(colours, names, strict=True)) if len(runs) > 1 else ""
    lines = _Lines(runs, names, colours)
    one = runs[0] if len(runs) == 1 else None
    return page(
        ", ".join(names),
        _header(runs, names),
        section("Side by side", _side_by_side(runs, names, colours), _SIDES),
        section("Configurations", _differences(runs, names), "The keys that are not the same in all of them."),
        section("Learning", legend + _grid(_learning(lines))),
        section("Scores on validation", legend + _grid(_scores(lines), "three"), _SCORES),
        section("Speed", legend + _grid(_speed(lines))),
        section("Routers", _grid(_routers(one)) if one else legend + _grid(_routers_of_several(lines)), _ROUTING),
        section(
            "What happened", "".join(_events(run, "" if one else name) for run, name in zip(runs, names, strict=True))
        ),
    )


_SCORES = (
    "From 0 to 1, higher is better. Dashed: the score of always giving the most frequent answer. Clearly above it is a "
    "score from two standard errors on, by the number of samples."
)
_SIDES = "Of the last record and the last validation; bold: the best of a column. Another seed moves all of them."
_ROUTING = (
    "Means over the clips of all steps since the record before. Mutual information of clip and encoder: 0 where all "
    "clips are sent alike, up to the entropy of an even choice (dashed), in nats."
)


def _names(runs: Sequence[Run]) -> list[str]:
    """Name the runs; those of equal name by their whole path."""
    names = [run.name for run in runs]
    return [run.url if names.count(run.name) > 1 else run.name for run in runs]


def _header(runs: Sequence[Run], names: Sequence[str]) -> str:
    one = runs[0] if len(runs) == 1 else None
    return tag(
        "header",
        tag("p", "Run" if one else f"{len(runs)} runs", class_="study"),
        tag("h1", escape(", ".join(names))),
        tag("p", escape(_answer(one) if one else _comparison(runs, names)), class_="answer"),
        tag("p", escape(f"{_state(one).capitalize()}.")) if one else "",
        tiles(_tiles(one)) if one else "",
        tag("p", escape(f"As of {time.strftime('%Y-%m-%d %H:%M:%S %Z')}."), class_="note", style="margin-top:8px"),
    )


def _answer(run: Run) -> str:
    last = run.last_scores()
    if not last:
        return f"Step {run.step}: nothing has been validated yet." if run.step else "Nothing has been trained yet."
    above = [name for name, scores in last.items() if _is_above(scores)]
    after = f"the most frequent answer after step {max(int(record['step']) for record in run.of('validation'))}"
    if not above:
        return f"No task scores clearly above {after}."
    if len(above) == len(last):
        return f"{'All tasks score' if len(last) > 1 else f'{above[0]} scores'} clearly above {after}."
    verb = "score" if len(above) > 1 else "scores"
    return f"{len(above)} of {len(last)} tasks ({listed(above, 5)}) {verb} clearly above {after}."


def _comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    losses = [
        (loss, name) for run, name in zip(runs, names, strict=True) if (loss := run.validation_loss()) is not None
    ]
    if len(losses) < 2:
        return "Fewer than two of these runs have been validated yet."
    (loss, best), *rest = sorted(losses)
    if loss == rest[-1][0]:
        return f"They all have a loss on validation of {loss:.3f}."
    others = listed([f"{name} has {value:.3f}" for value, name in rest], 4)
    return f"{best} has the lowest loss on validation, {loss:.3f}; {others}."


def _side_by_side(runs: Sequence[Run], names: Sequence[str], colours: Sequence[str]) -> str:
    """Return a table with a row for each of several runs: where it is, and its last figures."""
    if len(runs) < 2:
        return ""
    scores = [run.last_scores() for run in runs]
    speeds = [run.course("audio_s_per_s")[-1:] for run in runs]
    columns: dict[str, list[float | None]] = {"validation loss": [run.validation_loss() for run in runs]}
    for task in dict.fromkeys(task for found in scores for task in found):
        columns[task] = [found.get(task, {}).get("score") for found in scores]
    columns["audio-s/s"] = [points[0][1] if points else None for points in speeds]
    best = {
        name: (min if name == "validation loss" else max)((v for v in values if v is not None), default=None)
        for name, values in columns.items()
    }
    head = tag("tr", tag("th", "run"), tag("th"), *(tag("th", escape(name), class_="n") for name in columns))
    rows = []
    for i, (run, name, fill) in enumerate(zip(runs, names, colours, strict=True)):
        cells = [
            tag("td", tag("b", written) if values[i] == best[column] else written, class_="n")
            for column, values in columns.items()
            for written in [_written(values[i], "{:.0f}" if column == "audio-s/s" else "{:.3f}")]
        ]
        rows.append(tag("tr", tag("td", chips([(fill, name)], "chips in-row")), tag("td", escape(_state(run))), *cells))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="wide")


def _is_above(scores: Mapping[str, float]) -> bool:
    """Whether a score is two standard errors above the most frequent answer's; over n samples it counts as binomial."""
    error = math.sqrt(max(0.0, scores["score"] * (1 - scores["score"])) / max(1.0, scores.get("samples", 1)))
    return scores["score"] - scores["majority"] > 2 * error


def _state(run: Run) -> str:
    training, steps = run.config["training"], run.course("left_s")
    planned = training.get("max_steps")
    of = f" of {planned}" if planned else f", for {training['epochs']} epochs" if training.get("epochs") else ""
    if run.result is not None and run.result.get("steps", 0) >= run.step:
        return f"finished after {run.result.get('steps', run.step)} steps"
    left = f", {duration(steps[-1][1])} left at this pace" if steps and steps[-1][1] else ""
    return f"at step {run.step}{of}{left}"


def _tiles(run: Run) -> list[Sequence[str]]:
    train = run.of("train")
    last: Record = train[-1] if train else {}
    kept, restarts = len(run.checkpoints), run.of("recovery")
    bad = (run.data or {}).get("bad", 0)
    total = (run.data or {}).get("samples", 0)
    rows = [
        (_written(last.get("lm_loss"), "{:.3f}"), "loss in training", "of the next token, last record"),
        (_written(last.get("audio_s_per_s"), "{:.0f}"), "audio-seconds a second", _percent(last, "data_wait_share")),
        (_written(last.get("peak_memory_bytes"), "{:.1f} GB", 1e-9), "memory at its peak", "of the largest process"),
        (str(bad), "unusable samples", f"of {total}"),
        (str(len(restarts)), "restarts", f"{duration(sum(r['seconds'] for r in restarts))} in all" if restarts else ""),
        (str(kept), "checkpoints kept", run.checkpoints[-1] if kept else ""),
    ]  # fmt: skip
    return [row for row in rows if row[0] != "–"]


def _written(value: Any, form: str, factor: float = 1.0) -> str:
    return "–" if value is None else form.format(value * factor)


def _percent(record: Record, key: str) -> str:
    return "" if record.get(key) is None else f"{100 * record[key]:.0f} % of the time waits for data"


class _Lines:
    """Runs with their names and colours."""

    def __init__(self, runs: Sequence[Run], names: Sequence[str], colours: Sequence[str]):
        self.each = list(zip(runs, names, colours, strict=True))
        self.one = len(self.each) == 1

    def of(self, *keys: str) -> list[Series]:
        """Return a number of the training records, a line a run."""
        return [Series(keys[-1] if self.one else name, run.course(*keys), fill) for run, name, fill in self.each]


def _figure(title: str, series: Sequence[Series], y: Axis | None = None, legend: str = "") -> str:
    chart = line_chart(title, series, y=y)
    return tag("figure", tag("h3", escape(title)), legend, chart) if chart else ""


def _grid(figures: Sequence[str], kind: str = "two") -> str:
    shown = [figure for figure in figures if figure]
    return tag("div", *shown, class_=kind) if shown else ""


def _learning(lines: _Lines) -> list[str]:
    validation = []
    for run, name, fill in lines.each:
        for i, source in enumerate(dict.fromkeys(r.get("source", "") for r in run.of("validation"))):
            points = course([r for r in run.of("validation") if r.get("source", "") == source], "loss")
            label = f"validation {source}".strip() if lines.one else f"{name} {source}".strip()
            validation.append(Series(label, points, colour(i + 1) if lines.one else fill))
    trained = [
        Series("training", one.points, one.colour) if lines.one else one for one in lines.of("lm_loss")
    ]  # fmt: skip
    parts = sorted(
        {key for run, _, _ in lines.each for r in run.of("train") for key in r if key.startswith("routing_loss_")}
    )
    routing = [
        Series(part.removeprefix("routing_loss_"), lines.each[0][0].course(part), colour(i))
        for i, part in enumerate(parts)
    ]
    rate = "learning_rate" if any(run.course("learning_rate") for run, _, _ in lines.each) else "learning_rate_factor"
    together = [*trained, *validation] if lines.one else trained
    return [
        _figure("Loss of the next token", together, legend=_legend(together) if lines.one else ""),
        "" if lines.one else _figure("Loss on validation", validation),
        _figure("Routing loss by part", routing, legend=_legend(routing))
        if lines.one
        else _figure("Routing loss", lines.of("routing_loss")),
        _figure("Learning rate" if rate == "learning_rate" else "Learning rate, share of its peak", lines.of(rate)),
        _figure("Norm of the gradient", lines.of("grad_norm")),
    ]


def _legend(series: Sequence[Series]) -> str:
    return chips((one.colour, one.name) for one in series if one.points and not one.dashed)


def _scores(lines: _Lines) -> list[str]:
    sets = dict.fromkeys(
        (record.get("source", ""), task)
        for run, _, _ in lines.each
        for record in run.of("validation")
        for task in record["tasks"]
    )
    sources, end = {source for source, _ in sets}, float(max(run.step for run, _, _ in lines.each))
    figures = []
    for source, task in sets:
        series = []
        for run, name, fill in lines.each:
            records = [r for r in run.of("validation") if r.get("source", "") == source]
            series.append(Series("score" if lines.one else name, course(records, "tasks", task, "score"), fill))
            majority = course(records, "tasks", task, "majority")
            if majority and not any(one.dashed for one in series):
                series.append(
                    Series("most frequent answer", [(0.0, majority[-1][1]), (end, majority[-1][1])], fill, dashed=True)
                )
        figures.append(_figure(task if len(sources) == 1 else f"{source}, {task}", series, y=_SHARE))
    return figures


def _speed(lines: _Lines) -> list[str]:
    memory = [
        Series(one.name, [(x, y / 1e9) for x, y in one.points], one.colour) for one in lines.of("peak_memory_bytes")
    ]
    return [
        _figure("Audio-seconds a second", lines.of("audio_s_per_s")),
        _figure("Share of the time that waits for data", lines.of("data_wait_share"), y=_SHARE),
        _figure("Share of the audio that is padding", lines.of("padding_share"), y=_SHARE),
        _figure("Peak memory, in GB", memory),
    ]


def _routers(run: Run) -> list[str]:
    members = [member["name"] for member in run.config.get("model", {}).get("weak_encoders") or []]
    if not members:
        return []
    on = [router for router in _ROUTERS if any(value for _, value in run.course("routing", router, "entropy"))]
    figures = []
    for router in on:
        for kind, words in (("load", "share of clips"), ("probability", "mean probability")):
            series = [Series(m, run.course("routing", router, kind, m), colour(i)) for i, m in enumerate(members)]
            if kind == "probability" or router == "dependent":  # the other one's load is a choice for all clips
                figures.append(_figure(f"{_ROUTERS[router]}: {words}", series, _SHARE, _legend(series)))
    uniform = math.log(len(members))
    end = float(run.step)
    entropies = [
        Series(f"entropy, {router}", run.course("routing", router, "entropy"), colour(i)) for i, router in enumerate(on)
    ]
    entropies += [Series("mutual information", run.course("routing", "dependent", "mutual_information"), colour(2))]
    if on:
        entropies.append(Series("even choice", [(0.0, uniform), (end, uniform)], colour(0), dashed=True))
        figures.append(_figure("Entropies and mutual information", entropies, legend=_legend(entropies)))
    return figures


def _routers_of_several(lines: _Lines) -> list[str]:
    return [
        _figure("Entropy of the data-dependent router", lines.of("routing", "dependent", "entropy")),
        _figure("Mutual information of clip and encoder", lines.of("routing", "dependent", "mutual_information")),
    ]


def _events(run: Run, name: str) -> str:
    events = [(int(r["step"]), *_describe(r)) for r in run.records if r["kind"] in ("recovery", "skipped", "spike")]
    rows = [
        tag("tr", tag("td", str(step), class_="n"), tag("td", escape(what)), tag("td", escape(detail)))
        for step, what, detail in events[-_MOST_EVENTS:]
    ]
    head = tag("tr", tag("th", "step", class_="n"), tag("th", "event"), tag("th"))
    table = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="wide") if rows else ""
    causes = [
        f"{source}: " + ", ".join(f"{count} {cause}" for cause, count in found["causes"].items())
        for source, found in (run.data or {}).get("sources", {}).items()
        if found.get("causes")
    ]
    bad = tag("p", escape(f"Unusable samples. {'; '.join(causes)}.")) if causes else ""
    if not table and not bad:
        return ""
    return (tag("h3", escape(name), style="margin:14px 0 6px") if name else "") + bad + table


def _describe(record: Record) -> tuple[str, str]:
    if record["kind"] == "recovery":
        phases = {k: v for k, v in record.items() if k not in ("kind", "step", "seconds")}
        parts = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in phases.items())
        return f"restarted in {duration(record['seconds'])}", parts
    ids = ", ".join(record.get("ids", [])[:4])
    if record["kind"] == "spike":
        return f"loss of {record['loss']:.3f}, about {record['expected']:.3f} was expected", ids
    return f"skipped, its {record['reason']} was not finite", ids


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return a table of the keys whose values are not the same in all runs."""
    flat = [_flat(run.config) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for values in flat for key in values)
        if key not in _PLACES and len({json.dumps(values.get(key), sort_keys=True) for values in flat}) > 1
    ]
    if len(runs) < 2:
        return ""
    if not keys:
        return tag("p", "They are all the same.")
    head = tag("tr", tag("th", "key"), *(tag("th", escape(name)) for name in names))
    rows = [
        tag("tr", tag("td", tag("code", escape(key))), *(tag("td", escape(_value(values, key))) for values in flat))
        for key in keys
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="wide")


def _value(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "–"
    return values[key] if isinstance(values[key], str) else json.dumps(values[key])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping, by dotted keys as on the command line."""
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if not inside:
        return {prefix: value} if prefix else {}
    return {k: v for name, one in inside for k, v in _flat(one, f"{prefix}.{name}" if prefix else str(name)).items()}
