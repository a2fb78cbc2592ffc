"""The metrics of each task, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np

from mowe_ray.evaluation.judge.judge import Judge, Scale
from mowe_ray.evaluation.metrics.captions import ROUGE_L, cider_d, meteor
from mowe_ray.evaluation.metrics.classification import (
    CHOICE_ACCURACY,
    LETTER_ACCURACY,
    accuracy,
    labels_of,
    macro_f1,
    mean_average_precision,
    unweighted_accuracy,
)
from mowe_ray.evaluation.metrics.metric import Array, Metric, MissingDataError, mean_percent
from mowe_ray.evaluation.metrics.text_overlap import CHRF, EXACT_MATCH, TOKEN_F1, cer, wer
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.text_normalization import plain_label

# How each is made for a set of answers, its closed list of labels, and its language.
_Maker = Callable[[Sequence[Answer], Sequence[str], str | None], Metric]
_MAKERS: dict[str, _Maker] = {
    "wer": lambda answers, labels, language: wer(answers, language),
    "cer": lambda answers, labels, language: cer(answers, language),
    "accuracy": lambda answers, labels, language: accuracy(labels),
    "unweighted_accuracy": lambda answers, labels, language: unweighted_accuracy(labels),
    "macro_f1": lambda answers, labels, language: macro_f1(labels),
    "mean_average_precision": lambda answers, labels, language: mean_average_precision(labels),
    "choice_accuracy": lambda answers, labels, language: CHOICE_ACCURACY,
    "letter_accuracy": lambda answers, labels, language: LETTER_ACCURACY,
    "cider_d": lambda answers, labels, language: cider_d(answers),
    "meteor": lambda answers, labels, language: meteor(),
    "rouge_l": lambda answers, labels, language: ROUGE_L,
    "chrf": lambda answers, labels, language: CHRF,
    "exact_match": lambda answers, labels, language: EXACT_MATCH,
    "token_f1": lambda answers, labels, language: TOKEN_F1,
}
_DEFAULTS = {
    "asr": ("wer", "cer"),
    "er": ("accuracy", "unweighted_accuracy", "macro_f1"),
    "ac": ("cider_d", "meteor", "rouge_l", "chrf"),
    "mcq": ("choice_accuracy", "letter_accuracy"),
    "mcq_letter": ("letter_accuracy",),
    "tags": ("mean_average_precision",),
}
_DEFAULTS_OF_OTHERS = ("exact_match", "token_f1")


def register_metric(name: str) -> Callable[[_Maker], _Maker]:
    """Return a decorator that enters a function from answers, labels and language to a `Metric`.

    Raises:
        ValueError: There is another of this name.
    """

    def enter(make: _Maker) -> _Maker:
        known = _MAKERS.get(name)
        if known is not None and known.__module__ != make.__module__:
            raise ValueError(f"{name!r} is a metric already, of {known.__module__}; choose another name")
        _MAKERS[name] = make
        return make

    return enter


def check_names(names: Sequence[str] | None, key: str = "data.validation.N.metrics") -> None:
    """Refuse names that are no metric.

    Raises:
        ValueError: Names `key`, the unknown name and the nearest known one.
    """
    known = [*_MAKERS, *_NEEDS]
    for name in names or ():
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
            raise ValueError(f"{key}: {name!r} is no metric, {hint}")


def metrics_of(
    task: str,
    answers: Sequence[Answer],
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    extra: Sequence[Metric] = (),
    language: str | None = None,
) -> tuple[list[Metric], dict[str, str]]:
    """Return the metrics of a set of answers, the main one first, and why others that were asked for are unavailable.

    Args:
        answers: The whole set, of one task; some metrics depend on all its references.
        labels: The closed list; None takes the references.
        names: Of the metrics; None takes those of the task, then `extra`.
        extra: Metrics that were made elsewhere, of other models, also to be chosen by their names.
        language: Of transcripts; None takes it from the references.
    """
    check_names([name for name in names or () if name not in {metric.name for metric in extra}])
    made = {metric.name: metric for metric in extra}
    wanted = list(names) if names is not None else [*_DEFAULTS.get(task, _DEFAULTS_OF_OTHERS), *made]
    labels = labels_of(answers) if labels is None else labels
    metrics, unavailable = [], {}
    for name in dict.fromkeys(wanted):
        if name in made:
            metrics.append(made[name])
        elif name in _NEEDS:
            unavailable[name] = _NEEDS[name]
        else:
            try:
                metrics.append(_MAKERS[name](answers, labels, language))
            except MissingDataError as error:
                unavailable[name] = str(error)
    return metrics, unavailable


@dataclass(frozen=True)
class DatasetMetrics:
    """Metrics of a dataset.

    Attributes:
        names, labels, language: As in its `data.validation` entry.
        made: Metrics of other models (a judge, a sentence encoder), by name; those that were asked for.
    """

    names: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    made: Mapping[str, Metric] = field(default_factory=dict)
    language: str | None = None

    def of(self, task: str, answers: Sequence[Answer]) -> tuple[list[Metric], dict[str, str]]:
        """Return what `metrics_of` does for one of its tasks."""
        usual = (JUDGED_TASKS.get(task), "sentence_similarity" if task == "ac" else None)
        extra = [metric for name, metric in self.made.items() if self.names is not None or name in usual]
        return metrics_of(task, answers, self.labels, self.names, extra, self.language)

    def closed_list(self, answers: Sequence[Answer]) -> list[str]:
        """Return the labels that answers of one of its classifications are chosen from."""
        return labels_of(answers) if self.labels is None else list(dict.fromkeys(map(plain_label, self.labels)))


# AudioBench's choice for each task; transcripts are counted, not judged.
JUDGED_TASKS: dict[str, str] = {"ac": "judge", "aqa": "judge", "sqa": "judge", "er": "judge_binary"}
JUDGED_SCALES: dict[str, Scale] = {"judge": "graded", "judge_binary": "binary"}
# Metrics that another model computes, and what they need.
_NEEDS = dict.fromkeys(JUDGED_SCALES, "needs a judge: set judge.base_url and judge.model")
_NEEDS |= {"sentence_similarity": "needs a folder of a sentence encoder: set sentence_model"}


def judged_metric(name: str, judge: Judge) -> Metric:
    """Return `judge`, the mean of grades of 0 to 5 times 20, or `judge_binary`, the share of right answers."""
    scale = JUDGED_SCALES[name]

    def statistics(answers: Sequence[Answer]) -> Array:
        rows = [(verdict.score, 1.0) for verdict in judge.scores(answers, scale)]
        return np.array(rows, np.float64).reshape(-1, 2)

    return Metric(
        name=name,
        title={"graded": "judge %", "binary": "judge 0/1 %"}[scale],
        better="higher",
        statistics=statistics,
        value=mean_percent,
        note=lambda answers: judge.note(answers, scale),
    )
