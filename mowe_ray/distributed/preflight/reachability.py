"""Access from this node to the files of a run: checkpoints, audio, and the folder for its results."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import huggingface_hub
import numpy as np

from mowe_ray.config.model_section import ModelSection
from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards import first_samples, list_shards, shard_versions
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.storage import with_storage_timeout
from mowe_ray.distributed.preflight.requirements import Finding, Status, by_value, format_differences, name_nodes
from mowe_ray.output.run_folder import RunFolder

_HUB_ID = r"[\w.-]+(/[\w.-]+)?"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Shards of a source that are opened; all of them would take minutes on object storage.
_SHARDS_OPENED = 8


@dataclass(frozen=True)
class Reach:
    """The result of reading a path on this node.

    Attributes:
        content: Digest of the content; None if it cannot be read.
        problem: Why it cannot be read now; None if it can.
        fatal: Whether the run will not be able to read it either.
    """

    content: str | None = None
    problem: str | None = None
    fatal: bool = True


def checkpoint_places(model: ModelSection) -> dict[str, str]:
    """Returns the folders and hub ids that a run reads weights from, by key."""
    if model.init_from is not None:
        return {"model.init_from": model.init_from}
    sources = {"model.base_encoder": model.base_encoder, "model.language_model": model.language_model} | {
        f"model.weak_encoders.{i}.checkpoint": weak.checkpoint for i, weak in enumerate(model.weak_encoders)
    }
    return {key: source for key, source in sources.items() if isinstance(source, str)}


def reach_checkpoint(place: str) -> Reach:
    """Opens every file of a checkpoint: a folder, or a hub id in this machine's cache."""
    folder = Path(place)
    if folder.is_dir():
        return _reach_folder(folder)
    if not re.fullmatch(_HUB_ID, place):
        return Reach(problem="there is no such folder")
    cached = huggingface_hub.try_to_load_from_cache(place, "config.json")
    if isinstance(cached, str):
        return _reach_folder(Path(cached).parent)
    offline = huggingface_hub.constants.is_offline_mode()
    missing = f"neither a folder nor in the cache {huggingface_hub.constants.HF_HUB_CACHE}"
    if offline:
        return Reach(problem=f"{missing}, and HF_HUB_OFFLINE is set")
    return Reach(problem=f"{missing}: it will be downloaded when the run starts", fatal=False)


_ANY = Reading()


def reach_audio(paths: str | Sequence[str], reading: Reading = _ANY, allow_paths: Sequence[str] = ()) -> Reach:
    """Lists the shards of a source, opens some, and reads a sample."""
    try:
        shards = list_shards(paths)
        spread = {int(i) for i in np.linspace(0, len(shards) - 1, _SHARDS_OPENED)}
        sizes = [version.partition("-")[0] for version in shard_versions([shards[i] for i in sorted(spread)])]
        with ChildProcess() as child:
            samples = child.call(with_storage_timeout, 0.0, first_samples, shards[0], reading, allow_paths)
    except (OSError, ValueError) as error:
        return Reach(problem=str(error))
    except ChildDied as death:
        return Reach(problem=f"{death} that read the first samples of {shards[0]}", fatal=False)
    bad = [sample for sample in samples if not isinstance(sample, Sample)]
    if bad and len(bad) == len(samples):
        return Reach(problem=f"no usable sample at the start of {shards[0]}: {bad[0].cause}: {bad[0].detail}")
    first = paths if isinstance(paths, str) else paths[0]
    names = [shard.removeprefix(first) for shard in shards]
    return Reach(f"{len(shards)} shards ({_digest(json.dumps([names, sizes]).encode())})")


def check_place(key: str, found: Mapping[str, Reach], errors: Mapping[str, str], remedy: str) -> list[Finding]:
    """Compares what the nodes found at the path that `key` names.

    Args:
        found: Results by node.
        errors: Causes of the nodes without a result.
        remedy: The fix to recommend.
    """
    reached = {**found, **{machine: Reach(problem=why) for machine, why in errors.items()}}
    findings = []
    problems = {machine: reach.problem for machine, reach in reached.items() if reach.problem is not None}
    for why, machines in by_value(problems).items():
        status: Status = "failed" if any(reached[machine].fatal for machine in machines) else "warning"
        findings.append(Finding(status, f"{key}: {name_nodes(machines)}: {why}", f"{key}: {remedy}"))
    contents = {machine: reach.content for machine, reach in reached.items() if reach.content is not None}
    if len(set(contents.values())) > 1:
        detail = f"{key}: not the same everywhere: {format_differences(contents)}"
        findings.append(Finding("failed", detail, f"{key}: {remedy}"))
    return findings


def _reach_folder(folder: Path) -> Reach:
    try:
        config = (folder / "config.json").read_bytes()
        sizes = [(name, _open(folder / name)) for name in _weight_files(folder)]
    except (OSError, ValueError) as error:
        return Reach(problem=str(error))
    if not sizes:
        return Reach(problem=f"no weights in {folder}: neither {' nor '.join(_WEIGHTS)}, whole or in parts")
    return Reach(f"checkpoint {_digest(config + json.dumps(sizes).encode())}")


def _weight_files(folder: Path) -> list[str]:
    for name in _WEIGHTS:
        if (folder / name).exists():
            return [name]
        index = folder / f"{name}.index.json"
        if index.exists():
            return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    return []


def _open(file: Path) -> int:
    """Returns the size of a file, after reading from it."""
    with file.open("rb") as opened:
        opened.read(1)
    return file.stat().st_size


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def write_probe(storage: str, probe: str, machine: str) -> None:
    """Writes a file named after this node to the folder `probe` of `storage`."""
    RunFolder(storage, probe).write_text(f"{quote(machine, safe='')}.txt", machine)


def read_probes(storage: str, probe: str) -> list[str]:
    """Returns the names of the nodes whose files this node can read."""
    folder = RunFolder(storage, probe)
    return [folder.read_text(name) for name in folder.names("") if name.endswith(".txt")]


def remove_probes(storage: str, probe: str) -> None:
    """Removes the files of all nodes."""
    RunFolder(storage, probe).remove("")


def check_folder(
    key: str,
    storage: str,
    written: Mapping[str, str | None],
    seen: Mapping[str, list[str]],
    errors: Mapping[str, str],
) -> list[Finding]:
    """Compares what the nodes wrote with what each of them sees.

    Args:
        key: Key of the folder in the configuration.
        storage: The folder.
        written: Why a node could not write, None where it could.
        seen: Names of the nodes whose files each node has read.
        errors: Why other nodes could not read.
    """
    findings = [
        Finding(
            "failed",
            f"{key}: {name_nodes(machines)} cannot write to {storage}: {reason}",
            f"{key}: choose a folder or URL that every node may write, or mount it there with write access",
        )
        for reason, machines in by_value({name: why for name, why in written.items() if why}).items()
    ] + [
        Finding(
            "failed",
            f"{key}: {name_nodes(machines)} cannot read {storage}: {reason}",
            f"{key}: choose a folder or URL that every node can read",
        )
        for reason, machines in by_value(errors).items()
    ]
    authors = {name for name, why in written.items() if why is None}
    # Nodes that see the same authors look into the same folder, those that could not write among them.
    views = by_value({reader: "\n".join(sorted(authors & set(names))) for reader, names in seen.items()})
    if len(views) > 1:
        groups = " | ".join(name_nodes(readers) for readers in views.values())
        findings.append(
            Finding(
                "failed",
                f"{key}: {storage} is not one folder, these do not see each other's files: {groups}",
                f"{key}: a folder on shared storage, mounted at the same path on every node, or a URL (s3, gs, ...)",
            )
        )
    return findings
