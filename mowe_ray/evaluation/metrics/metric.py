"""Interface of metrics: statistics of each answer, whose sum over a set determines the value of the set.

Any subset, and any resample of a bootstrap, is then one sum away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mowe_ray.evaluation.predictions import Answer

Array = npt.NDArray[np.float64]


class MissingDataError(Exception):
    """Data that a metric needs are not installed; the message says what to do."""


@dataclass(frozen=True)
class Metric:
    """A score of a set of answers.

    N answers, S numbers of each.

    Attributes:
        name: As in `data.validation.N.metrics` and scores.json.
        title: As in tables, with its unit.
        better: Which way is good.
        statistics: Takes N answers, returns (N, S).
        value: Takes sums (..., S) of rows of the statistics, returns (...): percent, or points of 100.
        note: Takes the N answers, returns a remark on the value for readers, or None.
        normaliser: The rules that make transcripts comparable, where there are several.
    """

    name: str
    title: str
    better: Literal["lower", "higher"]
    statistics: Callable[[Sequence[Answer]], Array]
    value: Callable[[Array], Array]
    note: Callable[[Sequence[Answer]], str | None] = lambda _: None
    normaliser: str | None = None

    def of(self, answers: Sequence[Answer]) -> float:
        """Return the value of a set of answers."""
        return float(self.value(self.statistics(answers).sum(0)))


def mean_percent(sums: Array) -> Array:
    """Return 100 * sum / number: the `value` of metrics whose statistics are (score of 0..1, 1)."""
    return 100 * sums[..., 0] / sums[..., 1]


def mean_metric(name: str, title: str, score: Callable[[Answer], float]) -> Metric:
    """Return the metric that is the mean of a score of each answer, times 100; higher is better."""

    def statistics(answers: Sequence[Answer]) -> Array:
        return np.array([(score(answer), 1.0) for answer in answers], dtype=np.float64).reshape(-1, 2)

    return Metric(name, title, "higher", statistics, mean_percent)
