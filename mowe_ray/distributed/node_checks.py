"""Checks that every node makes where it is: code, folder for results, checkpoints, audio, disks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ray

from mowe_ray.config import RunConfig
from mowe_ray.distributed.every_node import Machines, Node
from mowe_ray.distributed.fitting import bundle_of
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.text import byte_size, counted
from mowe_ray.training.preflight.capacity import holds
from mowe_ray.training.preflight.findings import Check, Finding, conclude
from mowe_ray.training.preflight.needs import Needs
from mowe_ray.training.preflight.reach import (
    Reach,
    audio_places,
    checkpoint_places,
    judge_place,
    reach_audio,
    reach_checkpoint,
)
from mowe_ray.training.preflight.shared_folder import judge_folder, read_probes, remove_probes, write_probe
from mowe_ray.training.preflight.space import SCRATCH, judge_shared_memory, judge_space, judge_spilling, measure
from mowe_ray.training.preflight.versions import judge_versions, versions
from mowe_ray.training.sources import shards_of

_RAY_FOLDER = "Ray's folder"
_WORKING_DIRS = "runtime_resources"  # where Ray unpacks what travels with a job


def check_versions(machines: Machines) -> Check:
    """Does everybody run the same code?"""
    answers = machines.ask(lambda _: versions(), driver=True)
    return judge_versions(answers.said, answers.silent)


def check_storage(config: RunConfig, machines: Machines) -> Check:
    """Can the driver and all workers write and read the same folders?"""
    folders = {"storage": config.storage}
    if config.data.feature_cache is not None:
        folders["data.feature_cache"] = config.data.feature_cache
    findings = [f for key, folder in folders.items() for f in _shared(key, folder, config, machines)]
    if not Path(config.storage).is_absolute() and "://" not in config.storage and _WORKING_DIRS in Path.cwd().parts:
        detail = f"storage: {config.storage} is in the job's working directory, which Ray removes"
        findings.append(Finding("failed", detail, "storage: an absolute path, or a URL"))
    fine = f"written and read by the driver and {_count(trainers(config, machines))}: {', '.join(folders.values())}"
    return conclude("storage", fine, findings)


def _shared(key: str, folder: str, config: RunConfig, machines: Machines) -> list[Finding]:
    everybody = partial(machines.ask, nodes=trainers(config, machines), driver=True)
    probe = f"mowe_ray_preflight_{secrets.token_hex(4)}"
    try:
        written = everybody(lambda machine: write_probe(folder, probe, machine))
        seen = everybody(lambda _: read_probes(folder, probe))
    finally:
        everybody(lambda _: remove_probes(folder, probe))
    return judge_folder(key, folder, {**written.said, **written.silent}, seen.said, seen.silent)


def check_checkpoints(config: RunConfig, machines: Machines) -> Check:
    """Can every worker read the models?"""
    places, nodes = checkpoint_places(config.model), trainers(config, machines)
    findings = []
    for key, place in places.items():
        answers = machines.ask(_checkpoint_at(place), nodes)
        remedy = "a folder on shared storage, or the same copy at the same path on every node"
        findings += judge_place(key, answers.said, answers.silent, remedy)
    fine = f"read by {_count(nodes)}: {', '.join(dict.fromkeys(places.values()))}" if places else "none to load"
    return conclude("checkpoints", fine, findings)


def check_audio(config: RunConfig, machines: Machines) -> Check:
    """Can the driver, and all nodes that may decode, read the audio?"""
    decoders = [node for node in machines.nodes if node.resources.get("CPU", 0) >= 1] or machines.nodes
    places = audio_places(config.data)
    findings = []
    for key, (path, task) in places.items():
        answers = machines.ask(_audio_at(shards_of(path), task), decoders, driver=True)
        remedy = "a folder on shared storage, at the same path on every node, or a URL"
        if path.startswith("builtin:"):
            remedy += f"; python -m mowe_ray.prepare {path.partition(':')[0]} writes the built-in corpus to one"
        findings += judge_place(key, answers.said, answers.silent, remedy)
    if not config.data.train:
        findings.append(Finding("warning", "data.train: none given, so none was looked at", "data.train.0.path=FOLDER"))
    paths = ", ".join(dict.fromkeys(path for path, _ in places.values()))
    fine = f"read by the driver and {_count(decoders)}: {paths}"
    return conclude("audio", fine, findings)


def check_space(config: RunConfig, machines: Machines, needs: Needs) -> Check:
    """Is there enough disk for what the run writes, and shared memory for what its processes exchange?"""
    nodes = trainers(config, machines)
    folders = {_RAY_FOLDER: ray.get_runtime_context().get_temp_dir()}
    needed = {SCRATCH: needs.scratch}
    if local := RunFolder(config.storage, config.name).local_path(""):
        folders["storage"], needed["storage"] = str(local), needs.storage
    answers = machines.ask(lambda _: measure(folders), nodes)
    store_bytes = {node.name: node.resources.get("object_store_memory", 0.0) for node in nodes}
    findings = [
        *(Finding("failed", f"{machine}: {why}", "mount the disk") for machine, why in answers.silent.items()),
        *judge_space(needed, answers.said),
        *judge_spilling(_RAY_FOLDER, answers.said),
        *judge_shared_memory(answers.said, store_bytes),
    ]
    fine = ", ".join(f"{byte_size(count)} for {name}" for name, count in needed.items())
    unknown = f" and more for {', '.join(needs.unknown)}" if needs.unknown else ""
    return conclude("space", f"free on {_count(nodes)}: {fine}{unknown}, and shared memory", findings)


def trainers(config: RunConfig, machines: Machines) -> Sequence[Node]:
    """Return the nodes that can hold a worker; all if none can."""
    bundle = bundle_of(config)
    return [node for node in machines.nodes if holds(node.resources, bundle)] or machines.nodes


# What the nodes are asked travels as lambdas, and so by value: by name, it would bring this module there, and torch.
def _checkpoint_at(place: str) -> Callable[[str], Reach]:
    return lambda _: reach_checkpoint(place)


def _audio_at(path: str, task: str | None) -> Callable[[str], Reach]:
    return lambda _: reach_audio(path, task)


def _count(nodes: Sequence[Node]) -> str:
    return counted(len(nodes), "node")
