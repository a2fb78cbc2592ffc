"""The versions of Python, packages and drivers on this node, and whether all nodes have the same."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import mowe_ray
from mowe_ray.distributed.preflight.requirements import (
    Check,
    Finding,
    by_value,
    conclude,
    format_differences,
    name_nodes,
)

# What takes part in training, or in what processes send to each other.
_PACKAGES = (
    *("ray", "torch", "torchaudio", "transformers", "peft", "deepspeed"),
    *("numpy", "pyarrow", "pydantic", "fsspec", "safetensors", "tokenizers"),
)
# NodeRunner without a GPU may have another build of torch, and drivers may differ as far as CUDA allows.
_MAY_DIFFER = ("CUDA of torch", "NVIDIA driver")
_DRIVER = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str]:
    """Returns the versions on this node, by name; a package it lacks is `missing`, other things are not listed."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    found["mowe_ray"] = f"{mowe_ray.__version__} ({_digest(Path(mowe_ray.__file__).parent)})"
    for name, version in zip(_MAY_DIFFER, (_cuda_of_torch(), _nvidia_driver()), strict=True):
        if version is not None:
            found[name] = version
    return found


def compare_versions(found: Mapping[str, Mapping[str, str]], errors: Mapping[str, str]) -> Check:
    """Compares the versions of all nodes.

    Args:
        found: Results of `versions`, by node.
        errors: Causes of the nodes without a result.
    """
    findings = [
        Finding(
            "failed",
            f"{name_nodes(nodes)}: {reason}",
            "look at that machine, or take it out of the cluster"
            if reason.startswith("no answer")
            else "install the packages of constraints.txt there, and let the code travel: ray job submit "
            "--working-dir .",
        )
        for reason, nodes in by_value(errors).items()
    ]
    for name in dict.fromkeys(name for versions in found.values() for name in versions):
        values = {machine: versions[name] for machine, versions in found.items() if name in versions}
        if len(set(values.values())) > 1:
            findings.append(_difference(name, values))
        elif "missing" in values.values():
            findings.append(Finding("failed", f"{name} is not installed", "install the packages of constraints.txt"))
    shown = next(iter(found.values()), {})
    summary = ", ".join(f"{name} {shown[name]}" for name in ("python", "ray", "torch", *_MAY_DIFFER) if name in shown)
    return conclude("versions", f"the same on {len(found)} machines: {summary}", findings)


def _difference(name: str, values: Mapping[str, str]) -> Finding:
    detail = f"{name}: {format_differences(values)}"
    if name in _MAY_DIFFER:
        return Finding("warning", detail, "use one image for all GPU nodes")
    if name == "mowe_ray":
        return Finding("failed", detail, "let the code travel: ray job submit --working-dir .")
    return Finding("failed", detail, f"install the same {name} everywhere, as in constraints.txt")


def _digest(folder: Path) -> str:
    """Returns a digest of the code in `folder`: uncommitted changes have no version number."""
    content = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content.update(file.relative_to(folder).as_posix().encode())
        content.update(file.read_bytes())
    return content.hexdigest()[:8]


def _cuda_of_torch() -> str | None:
    # Read, not imported: that takes seconds.
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    if file is None or not file.is_file():
        return None
    match = re.search(r"^cuda\b.*=\s*['\"](.+?)['\"]", file.read_text(), re.MULTILINE)
    return match[1] if match else None


def _nvidia_driver() -> str | None:
    if not _DRIVER.is_file():
        return None
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text())
    return match[1] if match else None
