"""The same versions everywhere."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from mowe_ray.distributed.preflight.versions import compare_versions, versions


def test_what_this_machine_has() -> None:
    found = versions()
    assert found["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["peft"] == importlib.metadata.version("peft")
    assert found.get("CUDA of torch") == torch.version.cuda
    assert "missing" not in found.values()


@pytest.mark.slow
def test_another_version_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peft-0.1.dist-info").mkdir()
    (tmp_path / "peft-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    here = versions()
    monkeypatch.syspath_prepend(str(tmp_path))
    check = compare_versions({"a": here, "b": here, "c": versions()}, {})
    assert check.status == "failed"
    assert check.detail == f"peft: 0.1 on c; {here['peft']} on a, b"
    assert check.fix is not None
    assert "peft" in check.fix


def test_the_same_everywhere() -> None:
    check = compare_versions({"a": versions(), "b": versions()}, {})
    assert check.status == "ok"
    assert check.fix is None
    assert "2 machines" in check.detail


def test_drivers_may_differ_and_cpu_nodes_have_none() -> None:
    here = versions()
    check = compare_versions({"a": here | {"NVIDIA driver": "1"}, "b": here | {"NVIDIA driver": "2"}, "c": here}, {})
    assert check.status == "warning"
    assert "NVIDIA driver: 2 on b; 1 on a" in check.detail


def test_other_code_of_ours_and_packages_that_are_missing() -> None:
    here = versions()
    check = compare_versions({"a": here, "b": here | {"mowe_ray": "0 (ffffffff)"}}, {})
    assert check.status == "failed"
    assert "working-dir" in (check.fix or "")
    check = compare_versions({"a": here | {"deepspeed": "missing"}}, {})
    assert (check.status, check.detail) == ("failed", "deepspeed is not installed")


def test_a_machine_that_cannot_say() -> None:
    check = compare_versions({"a": versions()}, {"b": "ModuleNotFoundError: No module named 'mowe_ray'"})
    assert check.status == "failed"
    assert check.detail == "b: ModuleNotFoundError: No module named 'mowe_ray'"
