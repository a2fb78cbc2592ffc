"""chrF (Popović 2015, https://aclanthology.org/W15-3049): F2 of character n-grams, over a whole set.

As sacrebleu counts it by default (nc:6, nw:0, space:no, case:mixed, eff:yes), so that its figures can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mowe_ray.evaluation.answers import Answer
from mowe_ray.evaluation.metrics.metric import Array, Metric

_ORDERS = 6
_BETA = 2.0


def _ngrams(text: str) -> list[Counter[str]]:
    text = "".join(text.split())
    return [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, _ORDERS + 1)]


def _counts(given: list[Counter[str]], reference: list[Counter[str]]) -> list[int]:
    """Return, of each order, the n-grams in common, given, and of the reference; no order that it is too short for."""
    return [
        number
        for g, r in zip(given, reference, strict=True)
        for number in ((g & r).total(), g.total() if r else 0, r.total())
    ]


def _statistics(answers: Sequence[Answer]) -> Array:
    rows = np.zeros((len(answers), 3 * _ORDERS))
    for row, answer in zip(rows, answers, strict=True):
        given = _ngrams(answer.answer)
        choices = np.array([_counts(given, _ngrams(reference)) for reference in answer.references], dtype=np.float64)
        row[:] = choices[np.argmax(_chrf(choices))]
    return rows


def _chrf(sums: Array) -> Array:
    """Return F2 of the mean precision and the mean recall over the orders that both sides have, in percent."""
    common, given, reference = np.moveaxis(sums.reshape(*sums.shape[:-1], _ORDERS, 3), -1, 0)
    orders = (given > 0) & (reference > 0)
    number = np.maximum(1, orders.sum(-1))
    precision = np.divide(common, given, out=np.zeros_like(common), where=orders).sum(-1) / number
    recall = np.divide(common, reference, out=np.zeros_like(common), where=orders).sum(-1) / number
    below = _BETA**2 * precision + recall
    above = (1 + _BETA**2) * precision * recall
    return np.asarray(100 * np.divide(above, below, out=np.zeros_like(below), where=below > 0))


CHRF = Metric("chrf", "chrF (%)", "higher", _statistics, _chrf)
