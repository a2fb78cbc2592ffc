"""The number format of an evaluation: that of the run, and its own in what identifies stored answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mowe_ray.config import load_evaluation
from mowe_ray.distributed.ray_data.batch_inference import _Loaded
from mowe_ray.distributed.ray_data.evaluator import _numbers
from tests.exported_models import collapsed_model, export_to


@pytest.mark.parametrize(
    ("run", "overrides", "wanted"),
    [
        (None, [], torch.float32),
        ({"model": {"dtype": "auto"}}, [], torch.float32),
        ({"model": {"dtype": "auto"}}, ["compute.gpus_per_worker=1"], torch.bfloat16),
        ({"model": {"dtype": "bfloat16"}}, [], torch.bfloat16),
        ({"model": {"dtype": "bfloat16"}}, ["generation.dtype=float32"], torch.float32),
        ({"model": {"dtype": "float32"}}, ["compute.gpus_per_worker=1"], torch.float32),
    ],
)
def test_answers_are_stored_with_the_number_format_they_come_from(
    run: dict[str, Any] | None, overrides: list[str], wanted: torch.dtype
) -> None:
    target: Any = SimpleNamespace(served_as=None)
    assert f"torch.{_numbers(target, load_evaluation(run, overrides))}" == str(wanted)


def test_a_model_is_loaded_in_it(tmp_path: Path) -> None:
    export = str(export_to(tmp_path / "export", collapsed_model()))
    for name in ("bfloat16", "float32"):
        assert str(_Loaded(export, load_evaluation(None, [f"generation.dtype={name}"]))._model.dtype) == f"torch.{name}"
