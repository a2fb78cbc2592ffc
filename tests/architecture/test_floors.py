"""Imports only go down, and the light packages stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchaudio", "transformers", "peft", "ray", "deepspeed", "wandb")


@pytest.mark.slow
def test_import_contracts_hold() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("mowe_ray", (*HEAVY, "numpy", "pydantic", "yaml")),
        ("mowe_ray.config", (*HEAVY, "numpy", "pyarrow")),
    ],
)
def test_light_packages_load_nothing_heavy(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_private_names_of_ray_are_in_one_file() -> None:
    found = {file.name for file in (ROOT / "mowe_ray").rglob("*.py") if any(_private_imports(file))}
    assert found == {"ray_internals.py"}


def _private_imports(file: Path) -> Iterator[str]:
    """Modules of Ray that are no part of its API, as imported or as reached through `ray`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                found = [f"{module}.{alias.name}" for alias in names]
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.Attribute():
                found = [ast.unparse(node)]
            case _:
                continue
        for name in found:
            top, *parts = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in parts)
            if top == "ray" and (private or parts[:2] == ["autoscaler", "v2"]):
                yield name


@pytest.mark.slow
def test_decoding_imports_neither_torch_nor_ray_train() -> None:
    """Each process that decodes would pay ten seconds and 700 MB for them."""
    unwanted = [*(name for name in HEAVY if name != "ray"), "ray.train"]
    code = f"import sys, mowe_ray.distributed.ray_data.pipeline; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
