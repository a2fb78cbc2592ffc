"""SQuAD's two metrics of short answers (arXiv 1606.05250, section 6.1), each against the best reference."""

from __future__ import annotations

from collections import Counter

from mowe_ray.evaluation.answers import Answer
from mowe_ray.evaluation.metrics.metric import mean_metric
from mowe_ray.evaluation.text import normalise_answer


def _same(answer: Answer) -> float:
    given = normalise_answer(answer.answer)
    return float(any(given == normalise_answer(reference) for reference in answer.references))


def _best_overlap(answer: Answer) -> float:
    given = normalise_answer(answer.answer).split()
    return max(_overlap(given, normalise_answer(reference).split()) for reference in answer.references)


def _overlap(given: list[str], wanted: list[str]) -> float:
    """Return the F1 of two bags of words; two empty ones are the same."""
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))


EXACT_MATCH = mean_metric("exact_match", "exact match (%)", _same)
TOKEN_F1 = mean_metric("token_f1", "token F1 (%)", _best_overlap)
