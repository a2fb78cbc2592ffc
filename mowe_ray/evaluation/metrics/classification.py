"""Metrics of answers that are one of a closed list: of labels, all or the several that are right, or of choices.

Legend: L labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from mowe_ray.data.shards.choices import LETTERS
from mowe_ray.evaluation.metrics.metric import Array, Metric, mean_metric
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.text_normalization import plain_label


def labels_of(answers: Iterable[Answer]) -> list[str]:
    """Return the closed list that the references of a set are, without case and punctuation, sorted."""
    return sorted({plain_label(reference) for answer in answers for reference in answer.references})


def find_label(text: str, labels: tuple[str, ...]) -> str | None:
    """Return the label that a text is, or the only one it contains as words; None if that leaves none or several.

    The `happy` of a label `very happy` does not count as another label.

    Args:
        labels: As `plain` writes them.
    """
    contained = find_labels(text, labels)
    return contained.pop() if len(contained) == 1 else None


@lru_cache(maxsize=16)
def _any_of(labels: tuple[str, ...]) -> re.Pattern[str]:
    # Alternatives are tried in order: `very happy` has to come before `happy`.
    longest_first = sorted(map(re.escape, labels), key=len, reverse=True)
    return re.compile(rf"(?<!\S)(?:{'|'.join(longest_first)})(?!\S)")


def find_labels(text: str, labels: tuple[str, ...]) -> set[str]:
    """Return all labels that a text contains as words; in `very happy` there is no `happy` if both are labels."""
    text = plain_label(text)
    return {text} if text in labels else set(_any_of(labels).findall(text)) - {""}


def label_numbers(answers: Sequence[Answer], labels: Sequence[str]) -> list[tuple[int, int]]:
    """Return for each answer the numbers of the right label and of the given one, which is L for none."""
    known = _distinct(labels)
    place: dict[str | None, int] = {label: i for i, label in enumerate(known)}
    judged = (_judged(answer, known) for answer in answers)
    return [(place[right], place.get(given, len(known))) for given, right in judged]


def confusion(answers: Sequence[Answer], labels: Sequence[str]) -> list[list[int]]:
    """Return how often each label, and last none, was given (columns) where each label was right (rows)."""
    counts = np.zeros((len(_distinct(labels)), len(_distinct(labels)) + 1), int)
    for right, given in label_numbers(answers, labels):
        counts[right, given] += 1
    found: list[list[int]] = counts.tolist()
    return found


def accuracy(labels: Sequence[str]) -> Metric:
    """Return the share of answers that are the right label, in percent; an answer without a label is wrong."""
    known = _distinct(labels)
    return mean_metric("accuracy", "accuracy (%)", lambda answer: float(_hit(answer, known)))


def unweighted_accuracy(labels: Sequence[str]) -> Metric:
    """Return the mean over labels of their recall, of those that occur, in percent."""
    return Metric("unweighted_accuracy", "unweighted accuracy (%)", "higher", _counter(labels), _mean_recall)


def macro_f1(labels: Sequence[str]) -> Metric:
    """Return the mean over labels of their F1, of those that occur as reference or answer, in percent."""
    return Metric("macro_f1", "macro F1 (%)", "higher", _counter(labels), _mean_f1)


def mean_average_precision(labels: Sequence[str]) -> Metric:
    """Return the mean over labels, of those that occur, of their average precision, in percent.

    For tags: several labels are right, which are those in any of the references, and several may be given. A text says
    a label or not, with no confidence, so that a label's precision-recall curve has one step: its average precision is
    precision * recall + share * (1 - recall), as scikit-learn's `average_precision_score` of zeros and ones.
    """
    known = _distinct(labels)
    place = {label: i for i, label in enumerate(known)}

    def statistics(answers: Sequence[Answer]) -> Array:
        counts = np.zeros((len(answers), 3, len(known)))
        for row, answer in zip(counts, answers, strict=True):
            given = {place[label] for label in find_labels(answer.answer, known)}
            right = {place[label] for text in answer.references for label in find_labels(text, known)}
            for counted, found in zip(row, (given & right, given, right), strict=True):
                counted[list(found)] = 1
        return np.hstack([counts.reshape(len(answers), -1), np.ones((len(answers), 1))])

    return Metric("mean_average_precision", "mAP (%)", "higher", statistics, _mean_average_precision)


def _mean_average_precision(sums: Array) -> Array:
    hits, given, right = _split(sums[..., :-1])
    precision = np.divide(hits, given, out=np.zeros_like(hits), where=given > 0)
    recall = np.divide(hits, right, out=np.zeros_like(hits), where=right > 0)
    precisions = precision * recall + right / sums[..., -1:] * (1 - recall)
    occurs = right > 0
    return np.asarray(100 * (precisions * occurs).sum(-1) / np.maximum(1, occurs.sum(-1)))


def _is_right_choice(answer: Answer) -> float:
    """Judge as MMAU v05.15.25 and MMAR do: every word of the right choice, and none that only wrong ones have."""
    given = _words(answer.answer)
    for reference in answer.references:
        right = _words(reference)
        wrong = set().union(*map(_words, _choices(answer))) - right
        if given and right <= given and not given & wrong:
            return 1.0
    return 0.0


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


CHOICE_ACCURACY = mean_metric("choice_accuracy", "choice accuracy (%)", _is_right_choice)


def letter_of(text: str, choices: int) -> str | None:
    """Return the letter that a text chooses, by MMSU's rule: its first character, or else the last but one.

    So it reads `B`, `B. A dog` and `The answer is B.`; it also takes the article of `A dog barks` for a letter.

    Args:
        choices: How many there are; four letters are read in any case.
    """
    text = text.strip().replace("\n", "")
    return next((c for c in (text[:1], text[-2:-1]) if c and c in LETTERS[: max(4, choices)]), None)


def _is_right_letter(answer: Answer) -> float:
    choices = _choices(answer)
    right = {reference if reference in LETTERS else _letter(reference, answer) for reference in answer.references}
    return float(letter_of(answer.answer, len(choices)) in right)


def _letter(reference: str, answer: Answer) -> str:
    if reference not in answer.choices:
        raise ValueError(f"sample {answer.id!r}: its answer {reference!r} is none of its choices")
    return LETTERS[answer.choices.index(reference)]


def _choices(answer: Answer) -> list[str]:
    if not answer.choices:
        raise ValueError(f"sample {answer.id!r} has no choices, which its metric needs: give it a list `choices`")
    return answer.choices


def _without_letter(answers: Sequence[Answer]) -> str | None:
    silent = sum(letter_of(answer.answer, len(answer.choices)) is None for answer in answers)
    if not silent:
        return None
    return f"{silent} of {len(answers)} answers name no letter and count as wrong (MMSU's script leaves them out)"


LETTER_ACCURACY = replace(mean_metric("letter_accuracy", "letter accuracy (%)", _is_right_letter), note=_without_letter)


def _distinct(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(plain_label(label) for label in labels))


def _judged(answer: Answer, labels: tuple[str, ...]) -> tuple[str | None, str]:
    """Return the label that was given and the one that was right: the given one if any reference agrees."""
    given = find_label(answer.answer, labels)
    right = [_reference_label(answer, reference, labels) for reference in answer.references]
    return given, given if given is not None and given in right else right[0]


def _reference_label(answer: Answer, reference: str, labels: tuple[str, ...]) -> str:
    label = find_label(reference, labels)
    if label is None:
        raise ValueError(
            f"data.validation.N.labels: {', '.join(labels)} lack {reference!r}, the reference of sample {answer.id!r}"
        )
    return label


def _hit(answer: Answer, labels: tuple[str, ...]) -> bool:
    given, right = _judged(answer, labels)
    return given == right


def _counter(labels: Sequence[str]) -> Callable[[Sequence[Answer]], Array]:
    """Return the statistics (N, 3 L): hits of each label, how often it was given, how often it was right."""
    known = _distinct(labels)
    place = {label: i for i, label in enumerate(known)}

    def statistics(answers: Sequence[Answer]) -> Array:
        counts = np.zeros((len(answers), 3, len(known)))
        for row, answer in zip(counts, answers, strict=True):
            label, right_label = _judged(answer, known)
            row[2, place[right_label]] = 1
            if label is not None:
                row[1, place[label]] = 1
                row[0, place[label]] = label == right_label
        return counts.reshape(len(answers), -1)

    return statistics


def _mean_recall(sums: Array) -> Array:
    hits, _, right = _split(sums)
    return _mean_ratio(hits, right)


def _mean_f1(sums: Array) -> Array:
    hits, given, right = _split(sums)
    return _mean_ratio(2 * hits, given + right)


def _split(sums: Array) -> tuple[Array, Array, Array]:
    hits, given, right = np.split(sums, 3, axis=-1)
    return hits, given, right


def _mean_ratio(parts: Array, wholes: Array) -> Array:
    """Return the mean of parts / wholes (..., L) over labels whose whole is not 0, in percent."""
    # As in scikit-learn, labels that never occur are not averaged as zeros.
    occurs = wholes > 0
    ratios = np.divide(parts, wholes, out=np.zeros_like(parts), where=occurs)
    return np.asarray(100 * ratios.sum(-1) / occurs.sum(-1))
