"""95 % intervals of a metric by resampling its samples with replacement (percentile bootstrap).

Legend: N samples, S numbers of each (`Metric.statistics`), D draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mowe_ray.evaluation.metrics.metric import Array, Metric
from mowe_ray.evaluation.results import Interval

_DRAWS = 1000
_LOW, _HIGH = 2.5, 97.5
_WEIGHTS_AT_A_TIME = 2_000_000  # 16 MB of them


def interval(metric: Metric, statistics: Array, seed: int, draws: int = _DRAWS) -> Interval:
    """Return the metric of all samples and where 95 % of its resampled values lie.

    Args:
        statistics: (N, S); at least one sample. With just one both ends are its value.
    """
    resampled = np.concatenate([metric.value(w @ statistics) for w in _resamples(len(statistics), seed, draws)])
    return _interval(metric.value(statistics.sum(0)), resampled)


def paired_difference(
    metric: Metric, statistics_a: Array, statistics_b: Array, seed: int, draws: int = _DRAWS
) -> Interval:
    """Return the metric of `a` less that of `b`, and its interval when both are resampled alike.

    Args:
        statistics_a: (N, S) of the same N samples, in the same order, as `statistics_b`.
    """
    assert statistics_a.shape == statistics_b.shape
    resampled = np.concatenate(
        [
            metric.value(w @ statistics_a) - metric.value(w @ statistics_b)
            for w in _resamples(len(statistics_a), seed, draws)
        ]
    )
    return _interval(metric.value(statistics_a.sum(0)) - metric.value(statistics_b.sum(0)), resampled)


def _resamples(samples: int, seed: int, draws: int) -> Iterator[Array]:
    """Yield how often each sample is in each resample, (D, N) in portions of some draws."""
    assert samples, "nothing to resample"
    rng = np.random.default_rng(seed)
    for first in range(0, draws, portion := max(1, _WEIGHTS_AT_A_TIME // samples)):
        rows = min(portion, draws - first)
        places = rng.integers(samples, size=(rows, samples)) + samples * np.arange(rows)[:, None]
        yield np.bincount(places.ravel(), minlength=rows * samples).reshape(rows, samples).astype(np.float64)


def _interval(value: Array, resampled: Array) -> Interval:
    low, high = np.percentile(resampled, [_LOW, _HIGH])
    return Interval(float(value), float(low), float(high))
