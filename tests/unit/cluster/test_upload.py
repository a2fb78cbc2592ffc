"""What `ray job submit --working-dir .` takes along: the code, and nothing that commands have written."""

import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from tests.end_to_end import ROOT

LEFT_BEHIND = [
    ".git/config",
    ".venv/lib/torch.so",
    "runs/quickstart/checkpoints/step-00000001/rank.pt",
    "shards/builtin/train/00000.tar",
    "wandb/run.wandb",
    "mowe_ray/__pycache__/train.pyc",
    "tests/conftest.py",
]
TAKEN = [
    "mowe_ray/train.py",
    "mowe_ray/data/micro_batch.py",
    "sweeps/pool_size.yaml",
    "cluster/aws.yaml",
    "pyproject.toml",
]


def test_the_code_is_taken_and_what_commands_write_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    for name in [*LEFT_BEHIND, *TAKEN]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, checkout)
    monkeypatch.chdir(checkout)
    create_package(".", tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        taken = {name for name in package.namelist() if not name.endswith("/")}
    assert taken - {".gitignore", ".rayignore"} == set(TAKEN)
