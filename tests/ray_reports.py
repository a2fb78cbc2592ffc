"""A callback of Ray Train that writes down what the workers report, as a tool beside the run would see it."""

import json
import os
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ReportCallback  # Ray calls no `UserCallback` of the environment

FILE = "MOWE_RAY_TEST_REPORTS"
CALLBACK = {"RAY_TRAIN_CALLBACKS": "tests.ray_reports.SaveReports"}


class SaveReports(ReportCallback):
    """Made in the driver, called in Ray's controller; a line has the metrics of every rank."""

    def __init__(self) -> None:
        self._file = Path(os.environ[FILE])

    def after_report(self, training_report: object, metrics: list[dict[str, Any]]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
