"""Validation scores per task, higher is better, and the score a constant answer would get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import jiwer


def normalise(text: str) -> str:
    """Lower-case `text` without punctuation or doubled spaces; nothing left becomes the word "empty".

    AudioBench scores an empty text as that word; word error rate is undefined without it.
    """
    kept = "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower())
    return " ".join(kept.split()) or "empty"


def word_accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """1 - word error rate over the whole set, floored at 0 (many insertions make WER exceed 1)."""
    return max(0.0, 1.0 - float(jiwer.wer(list(references), list(answers))))


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to their reference."""
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(references)


def word_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the bags of words, the SQuAD answer overlap (arXiv 1606.05250, section 6.1)."""
    total = 0.0
    for answer, reference in zip(answers, references, strict=True):
        a, r = Counter(answer.split()), Counter(reference.split())
        shared = sum((a & r).values())
        total += 2 * shared / (sum(a.values()) + sum(r.values())) if shared else 0.0
    return total / len(references)


_METRIC = {"asr": word_accuracy, "ac": word_f1}


def score(task: str, answers: Sequence[str], references: Sequence[str]) -> float:
    """Score of one task in 0..1: word accuracy for `asr`, word F1 for `ac`, exact match for all others.

    Raises:
        ValueError: There is nothing to score.
    """
    if not references:
        raise ValueError(f"no references to score for task {task!r}")
    metric = _METRIC.get(task, exact_match)
    return metric([normalise(a) for a in answers], [normalise(r) for r in references])


def majority_score(task: str, references: Sequence[str]) -> float:
    """Score of answering every question with the set's own most frequent answer.

    The majority is taken from the references themselves, which is at least as hard to beat as
    the training set's majority.
    """
    most_frequent, _ = Counter(references).most_common(1)[0]
    return score(task, [most_frequent] * len(references), references)
