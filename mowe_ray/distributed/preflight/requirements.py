"""What a run requires of a cluster: workers that fit on its nodes, disk space and shared memory."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mowe_ray.config import RunConfig
from mowe_ray.distributed.resources import Resources
from mowe_ray.output.terminal import byte_size
from mowe_ray.training.build import model_dtype
from mowe_ray.training.clip_length import check_clip_length, check_families
from mowe_ray.training.estimate import estimate

Status = Literal["ok", "warning", "failed"]
_WORSE: tuple[Status, ...] = ("ok", "warning", "failed")


@dataclass(frozen=True)
class Finding:
    """A problem, and its remedy."""

    status: Status
    detail: str
    fix: str


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `fix` is the remedy of its problems, None if there are none."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


def conclude(name: str, fine: str, findings: Iterable[Finding]) -> Check:
    """Returns the outcome of a check with these findings; `fine` is its detail if there are none."""
    ordered = sorted(findings, key=lambda finding: -_WORSE.index(finding.status))
    if not ordered:
        return Check(name, "ok", fine)
    return Check(
        name,
        ordered[0].status,
        "; ".join(dict.fromkeys(finding.detail for finding in ordered)),
        "; ".join(dict.fromkeys(finding.fix for finding in ordered)),
    )


def by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the nodes of each value, the value of most nodes first."""
    nodes: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(value, []).append(node)
    return dict(sorted(nodes.items(), key=lambda entry: -len(entry[1])))


def format_differences(values: Mapping[str, str]) -> str:
    """Returns which nodes have which value, the rarest value first: `2.0 on c; 1.0 on a, b`."""
    # The odd node out is what the user looks for.
    groups = reversed(by_value(values).items())
    return "; ".join(f"{value} on {name_nodes(nodes)}" for value, nodes in groups)


def name_nodes(nodes: Iterable[str], at_most: int = 4) -> str:
    """Returns the names of the first `at_most` nodes, and how many more there are."""
    names = sorted(nodes)
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


ACCELERATOR = "accelerator_type:"
_KEYS = {"CPU": "compute.cpus_per_worker (or data.decode_cpus)", "GPU": "compute.gpus_per_worker"}


def holds(node: Resources, bundle: Resources) -> int:
    """Returns how many workers an empty node has room for."""
    # Ray places a bundle on one node: what is missing on it cannot come from another.
    return min(math.floor(node.get(key, 0.0) / least) for key, least in bundle.items())


def format_bundle(bundle: Resources) -> str:
    """Returns what one worker reserves, as text."""
    parts = [f"{bundle[key]:g} {key}" for key in _countable(bundle)]
    return ", ".join([*parts, *(key.removeprefix(ACCELERATOR) for key in bundle if key.startswith(ACCELERATOR))])


def check_capacity(
    bundle: Resources, workers: tuple[int, int], cpus: float, nodes: Sequence[Resources], most: Resources
) -> list[Finding]:
    """Compares what the run reserves with what the cluster has, or its autoscaler may add.

    Args:
        bundle: Resources of one worker, by Ray's names.
        workers: Smallest and largest number of workers.
        cpus: CPUs of the smallest number of workers and their decoding.
        nodes: Resources of each node that is up.
        most: Resources of all nodes together, once the autoscaler has added all it may.
    """
    held: float = sum(holds(node, bundle) for node in nodes)
    if any(most.get(key, 0.0) > sum(node.get(key, 0.0) for node in nodes) for key in _countable(bundle)):
        # Of nodes that may come, only their sum is known: neither their size nor their type of accelerator.
        held = max(held, min(_whole(most.get(key, 0.0) / bundle[key]) for key in _countable(bundle)))
    # All nodes are up: what fits on none of them will never fit.
    elif not held:
        return [_fits_nowhere(bundle, nodes)]
    if held < workers[0]:
        needed = f"{workers[0]} workers of {format_bundle(bundle)} are needed"
        detail = f"{needed}, and there is never room for more than {held:g}"
        return [Finding("failed", detail, "lower compute.num_workers, or raise the autoscaler's maximum of such nodes")]
    findings = []
    if cpus > most.get("CPU", 0.0):
        detail = f"training and decoding need {cpus:g} CPUs, and there will never be more than {most.get('CPU', 0.0):g}"
        findings.append(Finding("failed", detail, "lower data.decode_cpus, or add CPU nodes"))
    if held < workers[1]:
        detail = f"there will never be room for more than {held:g} of {workers[1]} workers"
        fix = "lower the second number of compute.num_workers, or raise the autoscaler's maximum"
        findings.append(Finding("warning", detail, fix))
    return findings


def _fits_nowhere(bundle: Resources, nodes: Sequence[Resources]) -> Finding:
    largest = {key: max((node.get(key, 0.0) for node in nodes), default=0.0) for key in bundle}
    lacking = [key for key, least in bundle.items() if largest[key] < least]
    if any(key.startswith(ACCELERATOR) for key in lacking):
        known = {key.removeprefix(ACCELERATOR) for node in nodes for key in node if key.startswith(ACCELERATOR)}
        have = f"the cluster's accelerators are {', '.join(sorted(known)) or 'none'}"
    elif lacking:
        have = f"the most that one has is {', '.join(f'{largest[key]:g} {key}' for key in lacking)}"
    else:
        have = "none has all of it together"
    keys = dict.fromkeys(_KEYS.get(key, "compute.accelerator_type") for key in lacking or bundle)
    return Finding(
        "failed",
        f"one worker needs {format_bundle(bundle)}, and no node will ever have that: {have}",
        f"change {', '.join(keys)}, or add such nodes to the cluster",
    )


def _countable(bundle: Resources) -> list[str]:
    return [key for key in bundle if not key.startswith(ACCELERATOR)]


def _whole(number: float) -> float:
    return math.floor(number) if math.isfinite(number) else number


# fp32 weight and AdamW's two moments.
_CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs.

    Attributes:
        storage: For the run folder: the checkpoints it keeps, the one being written, and the export.
        scratch: For temporary files: the export before it is copied, and on object storage a checkpoint.
        gradients: Gradients that a step reduces over all workers.
        unknown: Parts of the model whose size is not known, and not included.
    """

    storage: int
    scratch: int
    gradients: int
    unknown: tuple[str, ...]


def needs_of(config: RunConfig) -> Needs:
    """Estimates what a run needs, without loading its weights.

    Raises:
        ValueError: A checkpoint cannot be used, or clips may be longer than an encoder takes.
    """
    check_families(config.model)
    check_clip_length(config.model, config.data.max_duration_s)
    costs = estimate(config.model)
    total = costs.total
    assert total.weights is not None
    assert total.trainable is not None
    item = model_dtype(config.model, config.compute.gpus_per_worker > 0).itemsize
    export, checkpoint = int(total.weights.total) * item, _CHECKPOINT_BYTES * total.trainable
    return Needs(
        storage=(config.training.keep_checkpoints + 1) * checkpoint + export,
        # On object storage, checkpoints are written here first.
        scratch=export + (checkpoint if "://" in config.storage else 0),
        gradients=total.trainable * item,
        unknown=tuple(costs.unknown),
    )


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
    """Returns the space of named folders, of the one for temporary files, and of shared memory."""
    named = {**folders, SCRATCH: tempfile.gettempdir(), SHARED_MEMORY: "/dev/shm"}
    return {name: _space(folder) for name, folder in named.items()}


def check_disks(needed: Mapping[str, int], found: Mapping[str, Mapping[str, Space]]) -> list[Finding]:
    """Compares what is free with what is needed.

    Args:
        needed: Bytes needed, by the name of a folder.
        found: Results of `measure`, by node.
    """
    findings = []
    for name, least in needed.items():
        short = {machine: spaces[name] for machine, spaces in found.items() if spaces[name].free < least}
        for free, machines in by_value(
            {m: f"{byte_size(s.free)} free in {s.folder}" for m, s in short.items()}
        ).items():
            detail = f"{name}: {free} on {name_nodes(machines)}, and the run needs {byte_size(least)}"
            findings.append(Finding("failed", detail, _REMEDIES.get(name, f"free some, or choose another {name}")))
    return findings


def check_spilling(name: str, found: Mapping[str, Mapping[str, Space]]) -> list[Finding]:
    """Finds the nodes whose disk counts as full for Ray."""
    full = [m for m, spaces in found.items() if spaces[name].free < (1 - _FULL_SHARE) * spaces[name].total]
    if not full:
        return []
    folder = found[full[0]][name].folder
    detail = f"{name}: the disk of {folder} is more than {_FULL_SHARE:.0%} full on {name_nodes(full)}"
    return [Finding("failed", detail, "free some, or start Ray there with --temp-dir on another disk")]


def check_shared_memory(found: Mapping[str, Mapping[str, Space]], store_bytes: Mapping[str, float]) -> list[Finding]:
    """Finds the nodes whose shared memory is too small for Ray's object store, or for NCCL.

    Args:
        store_bytes: Size of the object store, by node.
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
    # The run creates the folder later: its file system is that of the nearest parent.
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return Space(folder, usage.free, usage.total)
