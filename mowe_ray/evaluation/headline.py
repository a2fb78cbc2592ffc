"""What an evaluation says in plain sentences, no more than its intervals allow."""

from __future__ import annotations

from collections.abc import Sequence

from mowe_ray.evaluation.comparison import Line, Verdict, against_majority, lines, others
from mowe_ray.evaluation.labels import WORDS, bounds, listed, score, test_set_names
from mowe_ray.evaluation.results import EvaluatedModel, Evaluation, Interval
from mowe_ray.output.text import amount

_LONG = 60  # letters of a list of names
_MOST_SCORES = 8  # told in words; the table has all of them

Names = dict[tuple[str, str], str]


def headline(evaluation: Evaluation) -> list[str]:
    """Return sentences, the most important first: each model against the baseline, or one against the majority."""
    main = [line for line in lines(evaluation) if line.main]
    names = test_set_names(line.test_set for line in main)
    compared = others(evaluation)
    if not compared:
        return _alone(main, names, evaluation.models[0].name)
    base = next(model for model in evaluation.models if model.name == evaluation.baseline)
    ordered = sorted(compared, key=lambda model: -_won(main, model.name))
    told = [_against(main, names, model.name, base.name) for model in ordered]
    return [*told, *filter(None, (_cost(model, base) for model in ordered))]


def _won(main: Sequence[Line], model: str) -> int:
    return sum({"better": 1, "worse": -1, "": 0}[line.verdict(model)] for line in main)


def _against(main: Sequence[Line], names: Names, model: str, base: str) -> str:
    verdicts = [(names[line.test_set], line.verdict(model)) for line in main if model in line.differences]
    return _sentence(model, base, verdicts) or f"{model} and {base} have no scored samples in common."


def _alone(main: Sequence[Line], names: Names, model: str) -> list[str]:
    verdicts = [(names[line.test_set], against_majority(line, model)) for line in main if line.majority is not None]
    told = [_sentence(model, "the most frequent answer", verdicts)]
    told += [_score(line, names[line.test_set], line.scores[model]) for line in main[:_MOST_SCORES]]
    return [sentence for sentence in told if sentence] or [f"Nothing of {model} was scored."]


def _score(line: Line, name: str, found: Interval) -> str:
    majority = "" if line.majority is None else f", the most frequent answer {score(line.majority)}"
    return f"{name}: {line.title} {score(found.value)} {bounds(found)}{majority}; {WORDS[line.better]}."


def _sentence(model: str, base: str, verdicts: Sequence[tuple[str, Verdict]]) -> str:
    """Write "pool beats no-pool on 2 of 5 tasks (asr and er) and is worse on 1 (aqa); on the other 2 ..."."""
    better, worse, open_ = ([name for name, found in verdicts if found == v] for v in ("better", "worse", ""))
    count, sets = len(verdicts), "test sets" if any(" · " in name for name, _ in verdicts) else "tasks"
    if not count:
        return ""
    if len(open_) == count:
        return f"{model} cannot be told from {base} on {f'any of {count} {sets}' if count > 1 else open_[0]}."
    won = f"beats {base} {_where(better, count, sets)}" if better else ""
    lost = (
        f"is worse{'' if better else f' than {base}'} {_where(worse, count, '' if better else sets)}" if worse else ""
    )
    both = " and ".join(filter(None, (won, lost)))
    others = f"on the other {len(open_)}" if len(open_) > 1 else "on the other"
    return f"{model} {both}{f'; {others} they cannot be told apart' if open_ else ''}."


def _where(names: Sequence[str], count: int, sets: str) -> str:
    if count == 1:
        return f"on {names[0]}"
    if len(names) == count:
        return f"on all {count} {sets}"
    of = f" of {count} {sets}" if sets else ""
    return f"on {len(names)}{of} ({listed(names, 3 if len(' '.join(names)) > _LONG else 5)})"


def _cost(model: EvaluatedModel, base: EvaluatedModel) -> str:
    if not base.active or f"{model.active / base.active:.3g}" == "1":
        return ""
    work = "" if model.gflops is None or not base.gflops else f" and {model.gflops / base.gflops:.3g} times its GFLOPs"
    return (
        f"A clip runs {amount(model.active)} parameters of {model.name}, {model.active / base.active:.3g} times those "
        f"of {base.name}{work}."
    )
