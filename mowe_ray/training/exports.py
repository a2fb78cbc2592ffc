"""The model of a run as a folder on the run's storage."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.exporting import export
from mowe_ray.output.run_folder import RunFolder


def write_export(
    model: MoweForConditionalGeneration,
    processor: MoweProcessor,
    weights: Mapping[str, torch.Tensor],
    folder: RunFolder,
    name: str,
) -> None:
    """Write `model` with all its `weights` to the folder `name` of the run, in place of what was there."""
    with tempfile.TemporaryDirectory(prefix="mowe_ray_export_") as local:
        export(model, processor, local, state_dict=weights)
        folder.upload(Path(local), name)
