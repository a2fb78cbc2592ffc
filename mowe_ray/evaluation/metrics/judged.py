"""Metrics that a language model gives, on AudioBench's two scales."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mowe_ray.evaluation.answers import Answer
from mowe_ray.evaluation.judge import Judge
from mowe_ray.evaluation.metrics.metric import Array, Metric, mean_percent
from mowe_ray.evaluation.rubrics import Scale

# AudioBench's choice for each task; transcripts are counted, not judged.
JUDGED_TASKS: dict[str, str] = {"ac": "judge", "aqa": "judge", "sqa": "judge", "er": "judge_binary"}
JUDGED_SCALES: dict[str, Scale] = {"judge": "graded", "judge_binary": "binary"}


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
