"""A plugin is one file beside the command: trained on two nodes that do not have it, exported, loaded elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mowe_ray.config.plugins import import_plugins
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from tests.end_to_end import ROOT, run_command, tone
from tests.ray_nodes import ray_nodes
from tests.tiny_runs import Corpus, tiny_arguments
from tests.unit.model.test_export import _ELSEWHERE

pytestmark = pytest.mark.soak
# Mounts an empty folder over the plugin's, for the processes of a node alone.
HIDDEN = ("unshare", "-m", "bash", "-c", 'mount -t tmpfs none "$0" && exec "$@"')


def can_hide(folder: Path) -> bool:
    """Whether this user may mount."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*HIDDEN, str(folder), "true"], capture_output=True, check=False).returncode == 0


def test_an_encoder_in_one_file_is_trained_on_nodes_without_it_and_loaded_elsewhere(
    tiny_corpus: Corpus, tmp_path: Path
) -> None:
    here = tmp_path / "only_here"
    here.mkdir()
    file = shutil.copy(ROOT / "examples" / "plugins" / "crepe.py", here)
    if not can_hide(here):
        pytest.skip("may not mount, so that nodes could not be kept from the file")
    arguments = [
        *tiny_arguments(tiny_corpus, tmp_path / "runs", "with_crepe"),
        f"plugins=[{file}]",
        "model.weak_encoders.1={name: pitch, checkpoint: {config: {model_type: crepe}}}",
        *("model.base_encoder_features=weighted_sum", "compute.num_workers=2", "training.max_steps=2"),
    ]
    with ray_nodes(PYTHONPATH=str(ROOT)) as nodes:
        for name in ("one", "other"):  # room for one worker each
            nodes.add(2, f"--node-name={name}", inside=(*HIDDEN, str(here)))
        done = run_command(*arguments, environment={"RAY_ADDRESS": nodes.address}, timeout_s=300)
    assert done.code == 0, done.err
    assert done.result["steps"] == 2

    export = tmp_path / "runs" / "with_crepe" / "export"
    wave = tone(220, 0.7)
    np.save(export / "wave.npy", wave)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [*HIDDEN, str(here), sys.executable, "-c", _ELSEWHERE, str(export), str(tmp_path / "logits.pt")],
        env=environment | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path / "runs",
        check=True,
        timeout=120,
    )
    import_plugins([str(file)])
    model = MoweForConditionalGeneration.from_pretrained(export).eval()
    inputs = MoweProcessor.from_pretrained(export)(["What?"], [[wave]], ["yes"])
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-5, rtol=1e-5)
