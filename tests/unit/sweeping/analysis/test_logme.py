"""LogME against the marginal likelihood of the same model, maximised by search over both precisions."""

import numpy as np
import pytest

from mowe_ray.sweeping.analysis.logme import MeanFeatures, logme, pool_logme


def log_marginal(features: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """log N(y; 0, F F' / alpha + I / beta), with all N x N numbers."""
    covariance = features @ features.T / alpha + np.eye(len(y)) / beta
    _, log_determinant = np.linalg.slogdet(covariance)
    return -0.5 * (log_determinant + y @ np.linalg.solve(covariance, y) + len(y) * np.log(2 * np.pi))


def best_by_search(features: np.ndarray, y: np.ndarray) -> float:
    center, width = np.zeros(2), 8.0
    for _ in range(14):  # of log alpha and log beta, ever closer
        grid = [center + width * np.array([i, j]) for i in np.linspace(-1, 1, 9) for j in np.linspace(-1, 1, 9)]
        center = max(grid, key=lambda point: log_marginal(features, y, *np.exp(point)))
        width /= 2
    return log_marginal(features, y, *np.exp(center)) / len(y)


@pytest.mark.parametrize("shape", [(40, 6), (30, 50)], ids=["few dimensions", "more dimensions than clips"])
def test_it_is_the_largest_marginal_likelihood_of_a_linear_model(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal(shape)
    labels = np.where(features[:, 0] + 0.7 * random.standard_normal(shape[0]) > 0, "dog", "cat")
    expected = np.mean([best_by_search(features, (labels == name).astype(float)) for name in ("cat", "dog")])
    assert logme(features, list(labels)) == pytest.approx(expected, abs=1e-5)


def task(count: int = 200, kinds: int = 4) -> MeanFeatures:
    random = np.random.default_rng(1)
    kind = random.integers(0, kinds, count)
    useful = np.eye(kinds)[kind] + 0.3 * random.standard_normal((count, kinds))
    noise = random.standard_normal((count, 5))
    noise[:, 0] = 7.0  # says nothing, and has no deviation to divide by
    return MeanFeatures([f"kind {k}" for k in kind], random.standard_normal((count, 3)), {"a": useful, "b": noise})


def test_the_pool_that_tells_the_answers_apart_is_ahead() -> None:
    found = pool_logme([task()], [[], ["a"], ["b"], ["a", "b"]])
    assert found is not None
    base, a, b, both = found
    assert a > both > max(base, b)
    scaled = task()
    wide = MeanFeatures(scaled.answers, 100 * scaled.base, {"a": 0.01 * scaled.weak["a"], "b": scaled.weak["b"]})
    assert pool_logme([wide], [["a"]]) == pytest.approx([a])


def test_features_that_say_nothing_have_the_evidence_of_none() -> None:
    labels = ["cat", "dog"] * 50
    noise = np.random.default_rng(5).standard_normal((100, 2))
    noise -= np.outer(np.tile([1.0, -1.0], 50), np.tile([1.0, -1.0], 50) @ noise / 100)  # orthogonal to both labels
    noise -= noise.mean(0)
    assert logme(noise, labels) == pytest.approx(logme(np.zeros((100, 0)), labels), abs=1e-6)


def test_only_classifications_count() -> None:
    one = task()
    transcripts = MeanFeatures([f"clip {i}" for i in range(200)], one.base, one.weak)
    assert pool_logme([one, transcripts], [["a"]]) == pool_logme([one], [["a"]])
    assert pool_logme([transcripts], [["a"]]) is None
    assert pool_logme([MeanFeatures(["yes"] * 200, one.base, one.weak)], [["a"]]) is None
