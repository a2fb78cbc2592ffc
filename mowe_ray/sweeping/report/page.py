"""A study's report: one HTML file with its question, the conclusions, and the results they are based on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mowe_ray.output.charts import escape, tag
from mowe_ray.output.html_page import page, section, tiles
from mowe_ray.output.terminal import amount, duration
from mowe_ray.sweeping.analysis.by_task import ByTask
from mowe_ray.sweeping.analysis.calibration import Calibration
from mowe_ray.sweeping.analysis.conclusions import answer
from mowe_ray.sweeping.analysis.effects import distinct, effects
from mowe_ray.sweeping.analysis.points import (
    Point,
    best,
    by_status,
    counts,
    finite,
    majority,
    metric_label,
    number,
    plus_minus,
    points,
    ranked,
    sampling_error,
)
from mowe_ray.sweeping.report.by_task import task_section
from mowe_ray.sweeping.report.charts import colouring, effect_charts, learning_curves, quality_against_cost
from mowe_ray.sweeping.report.one_shot import one_shot_sections
from mowe_ray.sweeping.report.parallel_coordinates import parallel_coordinates
from mowe_ray.sweeping.report.router_charts import heat_map, load_bars
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.trials import History, Trial, entry_label, entry_name, point_label

_ERRORS = {
    "seeds": "± is one standard error of the mean over seeds: the standard deviation between seeds, pooled over all "
    "points because few seeds say little about one, divided by the root of their number. It holds for this validation "
    "set; other clips would move all points alike.",
    "validation": "± is one standard error from the finite validation set: a task's score over n samples counts as "
    "binomial, and tasks are averaged. It does not hold what another seed would change.",
}
_NO_ERROR = "Without ±: one seed of a loss does not say how far another would be."
_RULES = (
    "A difference counts as one from two standard errors on. Only points with all seeds finished can win: trials "
    "stopped early have trained less, so they are shown but not compared. The best of many points is lucky as well as "
    "good: train it again before relying on its exact score.",
    "A value's mean is taken over the points that have it. Where every value was tried with the same settings of all "
    "else, these are paired, and the error is what value and setting together leave unexplained; otherwise it is the "
    "spread between points with equal value. It is never less than the points' own errors allow.",
)


def report(
    config: SweepConfig,
    trials: Sequence[Trial],
    histories: Mapping[int, History],
    best_yaml: str | None = None,
    elapsed_s: float | None = None,
    one_shot: Calibration | None = None,
    by_task: ByTask | None = None,
) -> str:
    """Return report.html.

    Args:
        histories: By number of the trial; those that are missing have no curves.
        best_yaml: The winner's configuration, as written to best.yaml.
        elapsed_s: How long the study took, if known.
        one_shot: Of a one-shot search, once there is a ranking.
        by_task: The points on equal clips.
    """
    measured = points(config, trials)
    winner = best(config, measured)
    return page(
        f"{config.name}: {config.question}",
        _answer(config, trials, winner, elapsed_s, one_shot),
        *one_shot_sections(one_shot, metric_label(config.objective.metric)),
        *_charts(config, trials, histories, measured, winner),
        task_section(by_task) if by_task is not None else "",
        _routing(config, trials, histories, measured, winner),
        section("All trials", trial_table(config, trials, winner), "Click a heading to sort.") if trials else "",
        _failures(trials),
        _best(config, winner, best_yaml),
        _uncertainty(config, measured, winner),
    )


def _unbroken(text: str) -> str:
    return text.replace(" ± ", "\u00a0±\u00a0")


def _answer(
    config: SweepConfig,
    trials: Sequence[Trial],
    winner: Point | None,
    elapsed_s: float | None,
    one_shot: Calibration | None,
) -> str:
    first, *rest = re.split(r"(?<=\.) (?=\S)", _unbroken(answer(config, trials, one_shot)))
    more = tag("ul", *(tag("li", escape(sentence)) for sentence in rest), class_="more") if rest else ""
    return tag(
        "header",
        tag("p", escape(f"Study {config.name}"), class_="study"),
        tag("h1", escape(config.question)),
        tag("p", escape(first), class_="answer"),
        more,
        _tiles(config, trials, winner, elapsed_s),
    )


def _tiles(config: SweepConfig, trials: Sequence[Trial], winner: Point | None, elapsed_s: float | None) -> str:
    wall_s, device_s = sum(t.wall_s for t in trials), sum(t.device_s for t in trials)
    metric = metric_label(config.objective.metric)
    guessed = majority(winner, config.objective.metric) if winner else None
    chance = f"{number(guessed)} by the most frequent answer" if guessed else ""
    contents = [
        (_unbroken(plus_minus(winner.mean, winner.error)) if winner else "–", f"best {metric}", chance),
        (str(len(trials)), f"trials of {len({t.point for t in trials})} points", counts(by_status(trials))),
        (duration(wall_s), "of training, all trials added up", f"{duration(elapsed_s)} elapsed" if elapsed_s else ""),
        (duration(device_s), "of device time", f"{duration(device_s / len(trials))} a trial" if trials else ""),
    ]
    return tiles(contents)


def _charts(
    config: SweepConfig,
    trials: Sequence[Trial],
    histories: Mapping[int, History],
    measured: Sequence[Point],
    winner: Point | None,
) -> list[str]:
    more, metric = config.objective.mode == "max", metric_label(config.objective.metric)
    named = list(distinct(effects(config, trials)))
    colours = colouring(named, more)
    quality = quality_against_cost(config, measured, colours)
    cost = "GFLOPs" if config.objective.against == "gflops" else "active parameters"
    across = parallel_coordinates(config, measured, colours)
    shown = effect_charts(named, metric, more)
    curves = [
        tag("figure", tag("h3", escape(title[0].upper() + title[1:])), chart)
        for title, chart in learning_curves(config, trials, histories, colours, winner)
    ]
    return [
        section(
            f"{escape(metric.capitalize())} against {cost}",
            colours.legend() + quality if quality else "",
            "A dot is a point of the space, the bar its standard error. No point lies beyond the dashed front: none is "
            "better at the same cost. The ringed one wins; hollow ones have seeds that did not finish.",
        ),
        section(
            "All points at once",
            colours.legend() + across if across else "",
            "A line is a point of the space, through its values to its cost and its score; the winner is bold.",
        ),
        section(
            "What each factor does",
            tag("div", *shown, class_="two") if shown else "",
            f"Mean {escape(metric)} over all finished points that share a value, with its standard error; faint dots "
            "are the points. Paired: only equal settings of all else are compared. What explains most comes first.",
        ),
        section(
            "Learning curves",
            colours.legend(narrow=True) + tag("div", *curves, class_="two") if curves else "",
            "The winner is bold. A dot ends a finished trial, a bar one stopped early, a cross one that failed.",
        ),
    ]


def _routing(
    config: SweepConfig,
    trials: Sequence[Trial],
    histories: Mapping[int, History],
    measured: Sequence[Point],
    winner: Point | None,
) -> str:
    routings = {number: h.routing for number, h in histories.items() if h.routing and h.routing.get("datasets")}
    order = [*ranked(config, measured), *(point for point in measured if not point.complete)]
    winners = [trial.number for trial in winner.trials] if winner else []
    bars = load_bars([trial for point in order for trial in point.trials], routings, set(winners))
    heat = heat_map([routings[number] for number in winners if number in routings])
    if heat and winner:
        title = f"By task, for the winner ({point_label(winner.values)}): share of clips sent to each member"
        heat = tag("h3", escape(title), style="margin:22px 0 8px") + tag("div", heat, class_="wide")
    note = "Share of the choices that each pool member got on validation, by the router that looks at the clip and by "
    return section("What the routers chose", bars + heat, note + "the one that is the same for all; best points first.")


def _failures(trials: Sequence[Trial]) -> str:
    failed = [trial for trial in trials if trial.error]
    written = [
        tag("details", tag("summary", escape(_failure(t))), tag("pre", escape(t.error)),
            open="open" if len(failed) <= 3 else None)
        for t in failed
    ]  # fmt: skip
    return section("Errors", "".join(written))


def _failure(trial: Trial) -> str:
    attempts = f"{trial.attempts} attempts" if trial.attempts != 1 else "1 attempt"
    return f"{trial.name}: {point_label(trial.values)}, seed {trial.seed}, {trial.status} after {attempts}"


def _best(config: SweepConfig, winner: Point | None, best_yaml: str | None) -> str:
    if winner is None or best_yaml is None:
        return ""
    file = f"{config.storage.rstrip('/')}/{config.name}/best.yaml"
    command = f"python -m mowe_ray.train --config {file} name={config.name}-best"
    return section(
        "Train the winner",
        tag("pre", escape(command))
        + tag("details", tag("summary", "Its configuration, best.yaml"), tag("pre", escape(best_yaml))),
        escape(
            f"{point_label(winner.values)}: the configuration of the best point, with everything that was set for it."
        ),
    )


def _uncertainty(config: SweepConfig, measured: Sequence[Point], winner: Point | None) -> str:
    sources = {point.error_from for point in measured}
    how = next((text for source, text in _ERRORS.items() if source in sources), _NO_ERROR)
    errors = [sampling_error(config.objective.metric, trial.tasks) for trial in winner.trials] if winner else []
    if "seeds" in sources and errors and errors[0] is not None:
        how += f" The validation set's own sampling error of the winner is {number(errors[0])}."
    return section("How certain this is", "".join(tag("p", text) for text in (how, *_RULES)))


def trial_table(config: SweepConfig, trials: Sequence[Trial], winner: Point | None) -> str:
    """Return the table, the winner's rows marked; headings are buttons for the page's script."""
    metric = config.objective.metric
    tasks = sorted({task for trial in trials for task in trial.tasks})
    extra = ["loss"] if metric != "loss" else []
    heads = [
        ("trial", True), *((entry_name(name), False) for name in config.entries), ("seed", True), ("state", False),
        (metric_label(metric), True), *((task, True) for task in tasks), *((name, True) for name in extra),
        ("active", True), ("steps", True), ("time", True),
    ]  # fmt: skip
    head = tag("tr", *(tag("th", tag("button", escape(name)), class_="n" if n else None) for name, n in heads))
    won = {trial.number for trial in winner.trials} if winner else set()
    rows = [_row(config, trial, tasks, trial.number in won) for trial in trials]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="wide")


def _row(config: SweepConfig, trial: Trial, tasks: Sequence[str], won: bool) -> str:
    metric = config.objective.metric
    active = trial.cost.active if trial.cost else None
    values = [entry_label(trial.values[name]) if name in trial.values else "" for name in config.entries]
    cells = [
        _number(trial.number, str(trial.number)),
        *(tag("td", escape(value)) for value in values),
        _number(trial.seed, str(trial.seed)),
        tag("td", escape(trial.status), class_=trial.status),
        _measure(trial.objective(metric)),
        *(_measure(trial.tasks.get(task, {}).get("score")) for task in tasks),
        *([_measure(trial.loss)] if metric != "loss" else []),
        _number(active, amount(active)),
        _number(trial.step, str(trial.step)),
        _number(trial.wall_s, duration(trial.wall_s)),
    ]
    return tag("tr", *cells, class_="won" if won else None)


def _measure(value: float | None) -> str:
    return _number(finite(value), number(finite(value)))


def _number(value: float | None, written: str) -> str:
    return tag("td", escape(written), class_="n", data_v="" if value is None else value)
