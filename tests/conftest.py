"""Settings every test shares; they are made before any test imports torch or ray."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Set, not defaulted: two cores and a deterministic sum order, whatever the developer's shell says.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    WANDB_MODE="offline",
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"may not mount a file system here: {mounted.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def shared_by(file: Path) -> str | None:
    """Return what tests of a file share with those of others: a run that nobody disturbs, or a local Ray; else None."""
    if file.parent.name != "integration":
        return None
    text = file.read_text(encoding="utf-8")
    if "reference: dict" in text:
        return "reference"
    return "ray" if any(name in text for name in ("ray_cluster", "quickstart:")) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what shares, for the jobs of CI that run the halves apart."""
    for file in {item.path for item in items}:
        if shared_by(file) is not None:
            for item in items:
                if item.path == file:
                    item.add_marker("shared")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Deal files out to two processes, those that share as one: a run and a Ray are started once."""
    return _ByFile(config, log)


class _ByFile(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return shared_by(self.config.rootpath / file) or file
