"""Free disk and shared memory of this machine, and whether they are enough."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mowe_ray.output.text import byte_size
from mowe_ray.training.preflight.findings import Finding, by_value, name_nodes

SCRATCH, SHARED_MEMORY = "temporary files", "shared memory"
# A disk that is fuller counts as full for Ray, whose object store then spills no more (local_fs_capacity_threshold).
_FULL_SHARE = 0.95
# What NCCL and PyTorch take of shared memory, several times: Docker's 64 MiB are too few.
_SHARED_BYTES = 256 << 20


@dataclass(frozen=True)
class Space:
    """Bytes of the file system that holds `folder`."""

    folder: str
    free: int
    total: int


def measure(folders: Mapping[str, str]) -> dict[str, Space]:
    """Return the space of named folders, of the one for temporary files, and of shared memory."""
    named = {**folders, SCRATCH: tempfile.gettempdir(), SHARED_MEMORY: "/dev/shm"}
    return {name: _space(folder) for name, folder in named.items()}


def judge_space(needed: Mapping[str, int], found: Mapping[str, Mapping[str, Space]]) -> list[Finding]:
    """Compare what is free with what is needed.

    Args:
        needed: Bytes by the name of a folder.
        found: What `measure` returned, by machine.
    """
    findings = []
    for name, least in needed.items():
        short = {machine: spaces[name] for machine, spaces in found.items() if spaces[name].free < least}
        for told, machines in by_value(
            {m: f"{byte_size(s.free)} free in {s.folder}" for m, s in short.items()}
        ).items():
            detail = f"{name}: {told} on {name_nodes(machines)}, and the run needs {byte_size(least)}"
            findings.append(Finding("failed", detail, _REMEDIES.get(name, f"free some, or choose another {name}")))
    return findings


def judge_spilling(name: str, found: Mapping[str, Mapping[str, Space]]) -> list[Finding]:
    """Tell the machines whose disk Ray takes for full."""
    full = [m for m, spaces in found.items() if spaces[name].free < (1 - _FULL_SHARE) * spaces[name].total]
    if not full:
        return []
    folder = found[full[0]][name].folder
    detail = f"{name}: the disk of {folder} is more than {_FULL_SHARE:.0%} full on {name_nodes(full)}"
    return [Finding("failed", detail, "free some, or start Ray there with --temp-dir on another disk")]


def judge_shared_memory(found: Mapping[str, Mapping[str, Space]], store_bytes: Mapping[str, float]) -> list[Finding]:
    """Tell the machines whose shared memory is smaller than Ray's object store, or than GPUs need to talk.

    Args:
        store_bytes: Size of the object store, by machine.
    """
    fix = "more /dev/shm: docker run --shm-size=..., in Kubernetes an emptyDir with medium: Memory"
    findings = []
    for machine, spaces in found.items():
        space = spaces[SHARED_MEMORY]
        if space.total < store_bytes.get(machine, 0):
            detail = f"{machine}: the object store ({byte_size(round(store_bytes[machine]))}) does not fit /dev/shm"
            findings.append(
                Finding("warning", f"{detail} ({byte_size(space.total)}): it lies on disk, which is slow", fix)
            )
        elif space.free < _SHARED_BYTES:
            detail = f"{machine}: {byte_size(space.free)} of /dev/shm are free, less than {byte_size(_SHARED_BYTES)}"
            findings.append(Finding("warning", detail, fix))
    return findings


_REMEDIES = {SCRATCH: "free some, or point TMPDIR of that node to another disk"}


def _space(folder: str) -> Space:
    path = Path(folder)
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return Space(folder, usage.free, usage.total)
