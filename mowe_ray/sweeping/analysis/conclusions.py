"""The answer to a study's question, in words, as certain as the data allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mowe_ray.output.terminal import amount
from mowe_ray.sweeping.analysis.calibration import Calibration, sentences
from mowe_ray.sweeping.analysis.effects import Effect, effects, gap
from mowe_ray.sweeping.analysis.points import (
    CLEAR,
    Point,
    advantage,
    by_status,
    cost_of,
    counts,
    finite,
    is_clear,
    majority,
    metric_label,
    number,
    pareto_front,
    plus_minus,
    points,
    ranked,
)
from mowe_ray.sweeping.schema import POOL_KEY, SweepConfig
from mowe_ray.sweeping.trials import Trial, point_label

_TASK_CLEAR = 3.0  # standard errors, where all tasks are searched for a difference: one of many is large by chance
_MOST_FACTORS = 3


def answer(config: SweepConfig, trials: Sequence[Trial], one_shot: Calibration | None = None) -> str:
    """Answer the study's question: the best point and how sure that is, and what matters.

    A difference below two standard errors is said to be none. The most important sentence comes first.
    """
    measured = points(config, trials)
    order = ranked(config, measured)
    ranking = list(sentences(one_shot)) if one_shot else []
    if not order:
        return " ".join([*ranking, _nothing_finished(config, trials), *_left_out(trials, measured)])
    front = [_front(config, measured)] if config.objective.against else []
    return " ".join(
        [
            *ranking,
            *_nothing_learned(config, order[0]),
            _winner(config, order),
            *_as_good(config, order),
            *front,
            *_factors(config, trials),
            *_left_out(trials, measured),
        ]
    )


def _subject(label: str) -> str:
    return label[0].upper() + label[1:] if label.startswith("no pool") else label


def _nothing_finished(config: SweepConfig, trials: Sequence[Trial]) -> str:
    sign = 1 if config.objective.mode == "max" else -1
    metric = config.objective.metric
    reached = [(sign * value, t) for t in trials if (value := finite(t.objective(metric))) is not None]
    yet = "" if trials and all(trial.over for trial in trials) else " yet"
    sentence = f"No answer{yet}: no point has finished with all of its seeds."
    if reached:
        value, trial = max(reached, key=lambda pair: pair[0])
        sentence += (
            f" The best {metric_label(metric)} so far is {number(sign * value)}, of {point_label(trial.values)} "
            f"(trial {trial.number}, {trial.status} at {trial.percent:.0f} %)."
        )
    return sentence


def _seeds(point: Point) -> str:
    return f"mean over {len(point.objectives)} seeds" if len(point.objectives) > 1 else "one seed"


def _winner(config: SweepConfig, order: Sequence[Point]) -> str:
    first, metric = order[0], metric_label(config.objective.metric)
    measured = f"{metric} {plus_minus(first.mean, first.error)} ({_seeds(first)})"
    name = _subject(point_label(first.values))
    if len(order) == 1:
        return f"{name} has {measured}; no other point has finished with all of its seeds."
    second = order[1]
    runner_up = f"{point_label(second.values)} ({plus_minus(second.mean, second.error)})"
    difference, error = advantage(config, first, second)
    side = "above" if config.objective.mode == "max" else "below"
    if is_clear(difference, error):
        return f"{name} is best: {measured}, {plus_minus(difference, error)} {side} the runner-up, {runner_up}."
    if error is None:
        return (
            f"{name} came out best, with {measured}, {number(difference)} {side} the runner-up, {runner_up}; "
            "with one seed nothing says how much of that is chance."
        )
    return (
        f"{name} came out best, with {measured}, but cannot be told apart from the runner-up, {runner_up}: "
        f"the difference is {plus_minus(difference, error)}."
    )


def _nothing_learned(config: SweepConfig, first: Point) -> Iterator[str]:
    guessed, metric = majority(first, config.objective.metric), metric_label(config.objective.metric)
    if guessed is not None and first.mean is not None and first.mean <= guessed:
        yield (
            f"No point does better than always giving the most frequent answer ({metric} {number(guessed)}): "
            "train longer before points are compared."
        )


def _as_good(config: SweepConfig, order: Sequence[Point]) -> Iterator[str]:
    """Name the cheapest point that is as good within the error."""
    first, price = order[0], cost_of(config, order[0])
    cheaper = []
    for point in order[1:]:
        (difference, error), cost = advantage(config, first, point), cost_of(config, point)
        if error is not None and not is_clear(difference, error) and cost and price and cost < price:
            cheaper.append((cost, -(point.mean or 0), point, f"{plus_minus(difference, error)}"))
    if cheaper and price:
        cost, _, point, _ = min(cheaper, key=lambda row: row[:2])
        unit = "GFLOPs a clip" if config.objective.against == "gflops" else "active parameters"
        yield (
            f"{_subject(point_label(point.values))} is as good within the error "
            f"({plus_minus(point.mean, point.error)}) and cheaper: {amount(cost)} {unit} instead of {amount(price)}."
        )


def _front(config: SweepConfig, measured: Sequence[Point]) -> str:
    front = pareto_front(config, measured)
    unit = "GFLOPs" if config.objective.against == "gflops" else "active parameters"
    listed = "; ".join(f"{point_label(p.values)} ({number(p.mean)}, {amount(cost_of(config, p))})" for p in front)
    return f"Worth their {unit} (Pareto front, cheapest first): {listed}." if front else ""


def _factors(config: SweepConfig, trials: Sequence[Trial]) -> Iterator[str]:
    """Describe the mean effect of each factor that the winner's sentence does not cover."""
    all_effects = effects(config, trials)
    if POOL_KEY in config.space:
        yield from _encoder(config, trials, all_effects)
    varied = [
        effect
        for effect in all_effects
        if effect.factor.kind in ("values", "range") and effect.factor.entry != POOL_KEY
    ]
    sizes = [effect for effect in all_effects if effect.factor.name == "pool size" and len(effect.levels) > 2]
    several = len(config.space) > 1
    for effect in [*varied, *sizes][:_MOST_FACTORS]:
        if effect.trend:
            yield _trend(config, effect)
        elif several or effect in sizes:
            yield _level(config, effect)


def _trend(config: SweepConfig, effect: Effect) -> str:
    assert effect.trend
    name, metric = effect.factor.name, metric_label(config.objective.metric)
    figures = f"rank correlation {effect.trend.correlation:+.2f} over {effect.trend.points} points"
    if not effect.trend.clear:
        return f"The {metric} shows no clear trend with {name} ({figures})."
    return f"The {metric} {'rises' if effect.trend.correlation > 0 else 'falls'} with {name} ({figures})."


def _level(config: SweepConfig, effect: Effect) -> str:
    sign = 1 if config.objective.mode == "max" else -1
    first, second = sorted(effect.levels, key=lambda level: -sign * level.mean)[:2]
    difference, error = gap(first, second)
    name, size = effect.factor.name, abs(difference)
    means = ", ".join(f"{level.label} gives {plus_minus(level.mean, level.error)}" for level in (first, second))
    if is_clear(difference, error):
        return f"On average over all else, {name} {first.label} is best by {plus_minus(size, error)} ({means})."
    return f"On average over all else, the best two values of {name} are alike within the error ({means})."


def _encoder(config: SweepConfig, trials: Sequence[Trial], all_effects: Sequence[Effect]) -> Iterator[str]:
    """Name the encoder whose presence changes the objective most; failing that, a task's score."""
    present = [effect for effect in all_effects if effect.factor.kind == "encoder"]
    clear = [effect for effect in present if is_clear(*_with_without(effect))]
    tasks = sorted({task for trial in trials if trial.status == "finished" for task in trial.tasks})
    by_task = {
        task: [e for e in effects(config, trials, f"score.{task}") if e.factor.kind == "encoder"] for task in tasks
    }
    if clear:
        most = max(clear, key=lambda effect: abs(_with_without(effect)[0]))
        same = {task: e for task, all_of in by_task.items() for e in all_of if e.factor.name == most.factor.name}
        yield f"{most.factor.name} {_verdict(config, most)}: {_in_numbers(most)}{_where(config, same)}."
        return
    searched = [(task, e) for task, all_of in by_task.items() for e in all_of if _certain(e)]
    if len(tasks) > 1 and searched:
        task, most = max(searched, key=lambda pair: abs(_with_without(pair[1])[0]))
        yield f"On {task}, {most.factor.name} {_verdict(config, most, task)}: {_in_numbers(most)}."
    elif present:
        yield "No encoder's presence makes a difference beyond the error."


def _with_without(effect: Effect) -> tuple[float, float | None]:
    levels = {level.label.split(" ", 1)[0]: level for level in effect.levels}
    return gap(levels["with"], levels["without"])


def _verdict(config: SweepConfig, effect: Effect, task: str | None = None) -> str:
    difference, _ = _with_without(effect)
    helps = difference > 0 if task or config.objective.mode == "max" else difference < 0
    return "matters most in a pool" if helps else "is best left out of a pool"


def _certain(effect: Effect) -> bool:
    difference, error = _with_without(effect)
    return error is not None and is_clear(difference, error * _TASK_CLEAR / CLEAR)


def _in_numbers(effect: Effect) -> str:
    levels = {level.label.split(" ", 1)[0]: level for level in effect.levels}
    a, b = levels["with"], levels["without"]
    return (
        f"{plus_minus(a.mean, a.error)} with it, {plus_minus(b.mean, b.error)} without "
        f"(difference {plus_minus(*_with_without(effect))})"
    )


def _where(config: SweepConfig, by_task: dict[str, Effect]) -> str:
    certain = {task: effect for task, effect in by_task.items() if _certain(effect)}
    if config.objective.metric.startswith("score.") or len(by_task) < 2 or not certain:
        return ""
    task = max(certain, key=lambda name: abs(_with_without(certain[name])[0]))
    levels = {level.label.split(" ", 1)[0]: level for level in certain[task].levels}
    return f", most of all on {task} ({number(levels['with'].mean)} with, {number(levels['without'].mean)} without)"


def _left_out(trials: Sequence[Trial], measured: Sequence[Point]) -> Iterator[str]:
    states = by_status(trials)
    if not trials:
        yield "There are no trials."
    elif states["finished"] < len(trials):
        unranked = sum(not point.complete for point in measured)
        of = f"{unranked} of {len(measured)} points" if len(measured) > 1 else "The point"
        yield f"Of {len(trials)} trials: {counts(states)}; {of} not ranked for that."
