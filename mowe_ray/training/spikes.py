"""Loss spikes: single steps whose loss is far above what the steps before let expect."""

from __future__ import annotations

import statistics
from collections import deque
from itertools import pairwise

_LEVEL = 20  # steps the expected loss is the median of, and history it takes before anything is called a spike
_WINDOW = 128  # steps the noise is estimated from
_SIGMAS = 7.0
_LEAST = 0.1  # a spike is at least this share above the expected loss, however quiet the curve


class SpikeDetector:
    """Compares each loss with the recent level, in units of the noise between neighbouring steps.

    A spike lies more than 7 standard deviations above the level: the limit with which OLMo 2 counts its spikes
    (arXiv 2501.00656, "spike score"); 128 steps are the window of llm.c's outlier detector. Both take mean and standard
    deviation, which one spike inflates so that it hides the next, and the fall of the loss inflates besides. Here the
    level is a median, and the standard deviation comes from the median absolute difference of neighbouring losses: a
    median of deviations is what Leys et al. recommend for outliers (J. Exp. Soc. Psychol. 49(4), 2013, 764-766), and
    differences hardly see a trend (von Neumann 1941).
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def expected_if_spike(self, loss: float) -> float | None:
        """Take in the next step's finite loss; returns the loss that was expected if it is a spike, else None."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < _LEVEL:
            return None
        level = statistics.median(before[-_LEVEL:])
        limit = level + max(_SIGMAS * _noise(before), _LEAST * level)
        return level if loss > limit else None


def _noise(losses: list[float]) -> float:
    """Return the standard deviation of a step's loss, for normally distributed noise on any slow trend.

    A difference of two has sqrt(2) times the deviation of one; the median of its absolute value is 0.6745 of that.
    """
    return statistics.median(abs(b - a) for a, b in pairwise(losses)) / (0.6745 * 2**0.5)
