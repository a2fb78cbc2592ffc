"""LogME, a score of frozen features for a classification that takes no training (arXiv 2102.11005).

Pools of speech encoders were ranked by it before (arXiv 2306.01015), which makes it a baseline for one-shot search.
Legend: N clips, D width of the features, K = min(N, D).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_MOST_ROUNDS, _TOLERANCE = 1000, 1e-8


@dataclass(frozen=True)
class MeanFeatures:
    """Features of the clips of one task, mean over their frames.

    Attributes:
        answers: (N,) what is right for each clip.
        base: (N, D) of the base encoder.
        weak: (N, D) of each weak encoder, by name; widths differ.
    """

    answers: Sequence[str]
    base: Array
    weak: Mapping[str, Array]

    @property
    def is_classification(self) -> bool:
        """Whether the answers are of few kinds, each of which comes twice on average."""
        return 2 <= len(set(self.answers)) <= len(self.answers) / 2

    def of_pool(self, pool: Collection[str]) -> Array:
        """Return (N, D) features of the base and some weak encoders side by side, standardised for each dimension."""
        joined = np.concatenate([self.base, *(self.weak[name] for name in sorted(pool))], 1)
        deviation = joined.std(0)
        standardised: Array = (joined - joined.mean(0))[:, deviation > 0] / deviation[deviation > 0]
        return standardised


def pool_logme(tasks: Sequence[MeanFeatures], pools: Sequence[Collection[str]]) -> list[float] | None:
    """Return the LogME of each pool, mean over the tasks that are classifications; None without any."""
    usable = [task for task in tasks if task.is_classification]
    if not usable:
        return None
    return [float(np.mean([logme(task.of_pool(pool), task.answers) for task in usable])) for pool in pools]


def logme(features: Array, labels: Sequence[str]) -> float:
    """Return the largest log evidence per clip of labels, mean over their kinds, each told from the rest.

    The evidence is that of a Gaussian linear model of the one-hot labels, y = F w + noise, at its best precisions of
    weights and noise.

    Args:
        features: F (N, D).
        labels: (N,).
    """
    u, singular, _ = np.linalg.svd(features, full_matrices=False)
    names = np.array(labels)
    one_hot = (names == np.unique(names)[:, None]).astype(np.float64)  # (kinds, N)
    return float(np.mean([_evidence(singular**2, (u.T @ y) ** 2, float(y @ y), len(y)) for y in one_hot]))


def _evidence(eigenvalues: Array, projected: Array, norm: float, n: int) -> float:
    """Maximise the log evidence per clip by MacKay's fixed point.

    Args:
        eigenvalues: (K,) of F F', the others being 0.
        projected: (K,) squares of the labels' coordinates along its eigenvectors.
        norm: Square of the labels' norm.
    """
    # Of the weights' precision to that of the noise; without a bound it would grow for ever where features say nothing.
    ratio, largest, tiny = 1.0, 1e9 * float(eigenvalues.max(initial=1.0)), np.finfo(float).tiny
    for _ in range(_MOST_ROUNDS):
        shrunk = eigenvalues + ratio
        effective = float((eigenvalues / shrunk).sum())
        weights = float((eigenvalues * projected / shrunk**2).sum())
        residual = float((projected * (ratio / shrunk) ** 2).sum()) + max(0.0, norm - float(projected.sum()))
        alpha, beta = effective / max(weights, tiny), (n - effective) / max(residual, tiny)
        before, ratio = ratio, min(alpha / beta, largest)
        if abs(ratio - before) <= _TOLERANCE * before:
            break
    determinant = -float(np.log1p(eigenvalues / ratio).sum()) if len(eigenvalues) else 0.0
    fit = n * np.log(beta / (2 * np.pi)) - beta * residual - ratio * beta * weights
    return float((determinant + fit) / (2 * n))
