"""Only commands, `distributed/`, dry runs and sweeps know the whole configuration."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mowe_ray"
WHOLE = {"RunConfig", "load_config"}
MAY = ("config/", "distributed/", "sweeping/", "training/dry_run.py")


def imported(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.slow
def test_the_whole_configuration_stays_above() -> None:
    files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py")}
    knowing = {name for name, file in files.items() if imported(file) & WHOLE}
    assert "distributed/ray_train/worker.py" in knowing
    assert {name for name in knowing if "/" in name and not name.startswith(MAY)} == set()
