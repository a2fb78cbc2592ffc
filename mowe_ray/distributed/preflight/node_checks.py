"""Checks that every node makes where it is: code, folder for results, checkpoints, audio, disks."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mowe_ray.config import RunConfig
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.preflight.reachability import (
    Reach,
    audio_places,
    checkpoint_places,
    judge_folder,
    judge_place,
    reach_audio,
    reach_checkpoint,
    read_probes,
    remove_probes,
    write_probe,
)
from mowe_ray.distributed.preflight.requirements import (
    SCRATCH,
    Check,
    Finding,
    Needs,
    conclude,
    holds,
    judge_shared_memory,
    judge_space,
    judge_spilling,
    measure,
)
from mowe_ray.distributed.preflight.versions import judge_versions, versions
from mowe_ray.distributed.resources import bundle_of
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import byte_size, counted
from mowe_ray.training.datasets import shards_of

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


T = TypeVar("T")

DRIVER = "the driver"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's.
        name: For people: the one it was started with, else its address; unique.
        resources: All it has, free or not.
    """

    id: str
    name: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Answers(Generic[T]):
    """What machines said, and why others said nothing, by name."""

    said: dict[str, T]
    silent: dict[str, str]


def alive_nodes() -> list[Node]:
    """Return the nodes that Ray can use now, by name."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = Counter(node["NodeName"] for node in alive)
    return sorted(
        (
            Node(
                node["NodeID"],
                node["NodeName"] if names[node["NodeName"]] == 1 else f"{node['NodeName']} ({node['NodeID'][:6]})",
                node["Resources"],
            )
            for node in alive
        ),
        key=lambda node: node.name,
    )


class Machines:
    """Asks nodes, and the driver; one that gives no answer in time is not asked again."""

    def __init__(self, nodes: Sequence[Node], timeout_s: float):
        """Wait `timeout_s` for an answer."""
        self._nodes, self._timeout_s = nodes, timeout_s
        self._late: set[str] = set()

    @property
    def nodes(self) -> list[Node]:
        """Those that have answered so far."""
        return [node for node in self._nodes if node.name not in self._late]

    def ask(
        self, question: Callable[[str], T], nodes: Sequence[Node] | None = None, *, driver: bool = False
    ) -> Answers[T]:
        """Call `question` with the machine's name on all nodes at once, in tasks that take no resources.

        Args:
            nodes: Only these.
            driver: Ask this process too: it may be elsewhere, and in another folder.
        """
        asked = [node for node in (self.nodes if nodes is None else nodes) if node.name not in self._late]
        tasks = {node.name: _on(node).remote(question, node.name) for node in asked}
        deadline = time.monotonic() + self._timeout_s
        answers: Answers[T] = Answers({}, {})
        if driver and DRIVER not in self._late:
            self._note(answers, DRIVER, lambda: within(self._timeout_s, partial(question, DRIVER)))
        for name, task in tasks.items():
            self._note(answers, name, partial(ray.get, task, timeout=max(deadline - time.monotonic(), 0)))
            if name in self._late:
                ray.cancel(task, force=True)
        return answers

    def _note(self, answers: Answers[T], machine: str, get: Callable[[], T]) -> None:
        try:
            answers.said[machine] = get()
        except TimeoutError:  # Ray's own is one, too
            answers.silent[machine] = f"no answer within {self._timeout_s:g} s"
            self._late.add(machine)
        except Exception as error:  # noqa: BLE001 - whatever a machine, its disk or its network says is the finding
            answers.silent[machine] = cause_of(error)


def _on(node: Node) -> ray.remote_function.RemoteFunction:
    return _call.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))


@ray.remote(num_cpus=0, max_retries=0)
def _call(question: Callable[[str], T], machine: str) -> T:
    return question(machine)


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise TimeoutError after so many seconds; it may go on in a thread.

    Raises:
        TimeoutError: It takes longer.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="limited")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]
