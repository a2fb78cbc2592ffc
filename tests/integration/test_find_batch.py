"""`--find-batch` under real limits on memory: what it finds grows with them, and the command says so."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.config import load_config
from mowe_ray.distributed.batch_size.find_batch import find_batch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OVERRIDES = ["data.max_duration_s=2.5", "data.max_batch_size=16"]


@pytest.fixture(scope="module")
def imported_bytes() -> int:
    """Memory of the process whose forks train, before it does, as RLIMIT_DATA counts it."""
    code = "import mowe_ray.distributed.batch_size.memory_trial; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (kib,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    return kib * 1024


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "mowe_ray.train", "--config", "quickstart", "--find-batch", *OVERRIDES, *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)


def test_twice_the_memory_holds_larger_micro_batches(imported_bytes: int) -> None:
    limit = imported_bytes + 450 * 2**20
    done = command("--memory-bytes", str(limit))
    assert done.returncode == 0, done.stderr
    small = json.loads(done.stdout.splitlines()[-1])
    (row,) = small["find_batch"]
    assert 1 <= row["clips"] < 16, "memory was the limit"
    assert row["batch_seconds"] == row["clips"] * row["seconds"]
    assert small["batch_seconds"] == pytest.approx(0.9 * row["batch_seconds"], abs=0.1)
    assert small["limit_bytes"] == limit
    assert "trying 1 x 2.5 s: fits" in done.stderr
    assert f"trying {row['clips'] + 1} x 2.5 s: out of memory: " in done.stderr
    lines: list[str] = []
    large: dict[str, Any] = find_batch(load_config("quickstart", OVERRIDES), lines.append, 2 * limit)
    assert large["batch_seconds"] > small["batch_seconds"]
    assert any(line.endswith("or more") for line in lines) == (large["find_batch"][0]["clips"] == 16)


def test_a_model_that_does_not_fit_is_an_error_that_names_keys(imported_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"one clip of 2.5 s does not fit into .* GiB .*data.max_duration_s"):
        find_batch(load_config("quickstart", OVERRIDES), print, imported_bytes + 10 * 2**20)


def test_a_checkpoint_that_is_missing_is_told_as_in_training(tmp_path: Path) -> None:
    config = load_config("quickstart", [*OVERRIDES, f"model.base_encoder={tmp_path}/nothing"])
    with pytest.raises(ValueError, match=f"cannot read a checkpoint from .{tmp_path}/nothing"):
        find_batch(config, print)


@pytest.mark.soak  # the same search in a task
@pytest.mark.usefixtures("ray_cluster")
def test_on_a_cluster_it_runs_in_a_task(imported_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # joined already: only says that there is a cluster
    found = find_batch(load_config("quickstart", OVERRIDES), print, imported_bytes + 450 * 2**20)
    assert found["find_batch"][0]["clips"] >= 1
    with pytest.raises(ValueError, match="does not fit into"):
        find_batch(load_config("quickstart", OVERRIDES), print, imported_bytes + 10 * 2**20)
