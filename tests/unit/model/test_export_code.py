"""An export carries the plugins of its model, and runs where neither they nor this package are installed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mowe_ray.config.plugins import import_plugins
from mowe_ray.model.building import WeakEncoder, build_processor
from mowe_ray.model.export import export
from tests.unit.model.conftest import MakeModel, waves
from tests.unit.model.test_export import _ELSEWHERE, logits_of

PACKAGE = {
    "__init__": "from export_me.filter import FilterEncoder\n",
    "filter": """
from mowe_ray.model.encoders import (
    ENCODERS,
    ModuleEncoder,
)
from .sizes import WIDTH
import torch


@ENCODERS.register("exported-filter")
class FilterEncoder(ModuleEncoder):
    model_type, width = "exported-filter", WIDTH
    frame_layers = ((400, 320, 0),)

    @staticmethod
    def build(config):
        return torch.nn.Linear(400, WIDTH)

    def encode(self, features, lengths, all_layers):
        return self.model(features.unfold(1, 400, 320))
""",
    "sizes": "WIDTH = 6\n",
    "not_needed": "def f():\n    import mowe_ray.train\n",
}


def package(folder: Path, name: str, **changes: str) -> str:
    (folder / name).mkdir()
    for module, text in (PACKAGE | changes).items():
        text = text.replace("export_me", name).replace("exported-filter", f"{name}-filter")
        (folder / name / f"{module}.py").write_text(text)
    import_plugins([str(folder / name)])
    return f"{name}-filter"


@pytest.mark.slow
def test_plain_transformers_loads_an_export_with_a_plugin(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    family = package(tmp_path, "goes_along")
    model = make_model(weak_encoders=[WeakEncoder("mine", {"model_type": family})]).eval()
    processor, folder, (wave,) = build_processor(model, tokenizer), tmp_path / "export", waves(0.7)
    export(model, processor, folder)
    assert {file.stem for file in folder.glob("goes_along*")} == {"goes_along_filter", "goes_along_sizes"}
    np.save(folder / "wave.npy", wave)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(folder), str(tmp_path / "logits.pt")],
        env=environment | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path / "export",
        check=True,
        timeout=120,
    )
    wanted = logits_of(model, dict(processor(["What?"], [[wave]], ["yes"])))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-5, rtol=1e-5)


def test_a_model_without_plugins_carries_none(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    package(tmp_path, "stays_here")
    model = make_model()
    export(model, build_processor(model, tokenizer), tmp_path / "export")
    assert list((tmp_path / "export").glob("stays_here*")) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "import mowe_ray.model.encoders",
            r"filter\.py:1: write `from MODULE import NAME` instead of importing mowe_ray",
        ),
        ("from mowe_ray.config import load_config", r"filter\.py:1: an export has no mowe_ray\.config"),
        ("from . import sizes", r"filter\.py:1: write `from MODULE import NAME` instead of importing sizes"),
    ],
)
def test_what_an_export_cannot_carry_is_named(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, line: str, message: str
) -> None:
    name = "cannot_go_" + str(abs(hash(line)))
    family = package(tmp_path, name, filter=f"{line}{PACKAGE['filter']}")
    model = make_model(weak_encoders=[WeakEncoder("mine", {"model_type": family})])
    with pytest.raises(ValueError, match=message):
        export(model, build_processor(model, tokenizer), tmp_path / "export")
