"""Checks that run on every node: versions, folder for results, checkpoints, audio, disks."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mowe_ray.config import RunConfig
from mowe_ray.data.index import SourceSpec
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.preflight.reachability import (
    Reach,
    check_folder,
    check_place,
    checkpoint_places,
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
    by_value,
    check_disks,
    check_shared_memory,
    check_spilling,
    conclude,
    holds,
    measure,
)
from mowe_ray.distributed.preflight.versions import compare_versions, versions
from mowe_ray.distributed.resources import bundle_of
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import byte_size, counted
from mowe_ray.training.datasets import source_specs

T = TypeVar("T")

DRIVER = "the driver"
_RAY_FOLDER = "Ray's folder"
_WORKING_DIRS = "runtime_resources"  # where Ray unpacks what travels with a job


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        id: Ray's id of the node.
        name: Unique name for messages: the one the node was started with, else its address.
        resources: Total resources, free or not, by Ray's names.
    """

    id: str
    name: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class NodeResults(Generic[T]):
    """The values that a function returned, and the causes of its failures, by the name of the node."""

    values: dict[str, T]
    errors: dict[str, str]


def alive_nodes() -> list[Node]:
    """Returns the nodes that Ray can use now, sorted by name."""
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


class NodeRunner:
    """Runs functions on all nodes, and on the driver; a node that has once timed out is left out from then on."""

    def __init__(self, nodes: Sequence[Node], timeout_s: float):
        """Wait `timeout_s` seconds for the result of a function."""
        self._nodes, self._timeout_s = nodes, timeout_s
        self._late: set[str] = set()

    @property
    def nodes(self) -> list[Node]:
        """The nodes that have not timed out."""
        return [node for node in self._nodes if node.name not in self._late]

    def map(
        self, function: Callable[[str], T], nodes: Sequence[Node] | None = None, *, driver: bool = False
    ) -> NodeResults[T]:
        """Calls `function` with the node's name on all nodes at once, in tasks that reserve no resources.

        Args:
            nodes: Run it on these only.
            driver: Run it in this process too, which may be on another machine and in another folder.
        """
        chosen = [node for node in (self.nodes if nodes is None else nodes) if node.name not in self._late]
        tasks = {node.name: _on(node).remote(function, node.name) for node in chosen}
        # One deadline for all: tasks run at the same time, so that ten hanging nodes cost no more than one.
        deadline = time.monotonic() + self._timeout_s
        results: NodeResults[T] = NodeResults({}, {})
        if driver and DRIVER not in self._late:
            self._record(results, DRIVER, lambda: within(self._timeout_s, partial(function, DRIVER)))
        for name, task in tasks.items():
            self._record(results, name, partial(ray.get, task, timeout=max(deadline - time.monotonic(), 0)))
            if name in self._late:
                # Its process may hang in a mount or a socket, where nothing gentler reaches it.
                ray.cancel(task, force=True)
        return results

    def _record(self, results: NodeResults[T], node: str, get: Callable[[], T]) -> None:
        try:
            results.values[node] = get()
        except TimeoutError:  # Ray's own is one, too
            results.errors[node] = f"no answer within {self._timeout_s:g} s"
            self._late.add(node)
        except Exception as error:  # noqa: BLE001 - code, disk and network of a node each raise their own
            results.errors[node] = cause_of(error)


def _on(node: Node) -> ray.remote_function.RemoteFunction:
    return _call.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))


@ray.remote(num_cpus=0, max_retries=0)
def _call(function: Callable[[str], T], node: str) -> T:
    return function(node)


def within(timeout_s: float, function: Callable[[], T]) -> T:
    """Returns what `function` returns; it runs in a thread, which goes on after a timeout.

    The thread is a daemon: a process does not wait at its end for a node or a storage that never answers.

    Raises:
        TimeoutError: It takes longer than `timeout_s` seconds.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="limited").start()
    if not wait([future], timeout_s).done:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return future.result()


def check_versions(runner: NodeRunner) -> Check:
    """Checks that all nodes run the same code."""
    results = runner.map(lambda _: versions(), driver=True)
    return compare_versions(results.values, results.errors)


def check_storage(config: RunConfig, runner: NodeRunner) -> Check:
    """Checks that the driver and all worker nodes write and read the same folders."""
    folders = {"storage": config.storage}
    if config.data.feature_cache is not None:
        folders["data.feature_cache"] = config.data.feature_cache
    findings = [f for key, folder in folders.items() for f in _shared(key, folder, config, runner)]
    if not Path(config.storage).is_absolute() and "://" not in config.storage and _WORKING_DIRS in Path.cwd().parts:
        detail = f"storage: {config.storage} is in the job's working directory, which Ray removes"
        findings.append(Finding("failed", detail, "storage: an absolute path, or a URL"))
    fine = f"written and read by the driver and {_count(worker_nodes(config, runner))}: {', '.join(folders.values())}"
    return conclude("storage", fine, findings)


def _shared(key: str, folder: str, config: RunConfig, runner: NodeRunner) -> list[Finding]:
    everywhere = partial(runner.map, nodes=worker_nodes(config, runner), driver=True)
    probe = f"mowe_ray_preflight_{secrets.token_hex(4)}"
    try:
        written = everywhere(lambda node: write_probe(folder, probe, node))
        seen = everywhere(lambda _: read_probes(folder, probe))
    finally:
        # On every node: where the folder is not shared, each has its own probes.
        everywhere(lambda _: remove_probes(folder, probe))
    return check_folder(key, folder, {**written.values, **written.errors}, seen.values, seen.errors)


def check_checkpoints(config: RunConfig, runner: NodeRunner) -> Check:
    """Checks that every worker node can read the models."""
    places, nodes = checkpoint_places(config.model), worker_nodes(config, runner)
    findings = []
    for key, place in places.items():
        results = runner.map(_checkpoint_at(place), nodes)
        remedy = "a folder on shared storage, or the same copy at the same path on every node"
        findings += check_place(key, results.values, results.errors, remedy)
    fine = f"read by {_count(nodes)}: {', '.join(dict.fromkeys(places.values()))}" if places else "none to load"
    return conclude("checkpoints", fine, findings)


def check_tracking(config: RunConfig, runner: NodeRunner) -> Check:
    """Checks that the driver and every worker node have the keys and packages of the trackers that are on."""
    tracking, nodes = config.tracking, worker_nodes(config, runner)
    results = runner.map(lambda _: tracking.missing(), nodes, driver=True)
    findings = [Finding("failed", f"{node}: {why}", "ray status") for node, why in results.errors.items()]
    for line, lacking in by_value({node: "; ".join(lacks) for node, lacks in results.values.items() if lacks}).items():
        findings.append(Finding("failed", f"on {', '.join(lacking)}: {line}", "cluster/README.md, Secrets"))
    return conclude("tracking", f"keys and packages on the driver and {_count(nodes)}", findings)


def check_audio(config: RunConfig, runner: NodeRunner) -> Check:
    """Checks that the driver, and all nodes that may decode, can read the audio."""
    decoders = [node for node in runner.nodes if node.resources.get("CPU", 0) >= 1] or runner.nodes
    places = source_specs(config.data, config.seed)
    findings = []
    for key, source in places.items():
        results = runner.map(_audio_at(source, config.data.allow_paths), decoders, driver=True)
        remedy = "a folder on shared storage, at the same path on every node, or a URL"
        if source.path.startswith("builtin:"):
            remedy += f"; python -m mowe_ray.prepare {source.path.partition(':')[0]} writes the built-in corpus to one"
        findings += check_place(key, results.values, results.errors, remedy)
    if not config.data.train:
        findings.append(Finding("warning", "data.train: none given, so none was looked at", "data.train.0.path=FOLDER"))
    paths = ", ".join(dict.fromkeys(source.path for source in places.values()))
    fine = f"read by the driver and {_count(decoders)}: {paths}"
    return conclude("audio", fine, findings)


def check_space(config: RunConfig, runner: NodeRunner, needs: Needs) -> Check:
    """Checks that there is enough disk for the files of the run, and shared memory for its processes."""
    nodes = worker_nodes(config, runner)
    folders = {_RAY_FOLDER: ray.get_runtime_context().get_temp_dir()}
    needed = {SCRATCH: needs.scratch}
    if local := RunFolder(config.storage, config.name).local_path(""):
        folders["storage"], needed["storage"] = str(local), needs.storage
    results = runner.map(lambda _: measure(folders), nodes)
    store_bytes = {node.name: node.resources.get("object_store_memory", 0.0) for node in nodes}
    findings = [
        *(Finding("failed", f"{machine}: {why}", "mount the disk") for machine, why in results.errors.items()),
        *check_disks(needed, results.values),
        *check_spilling(_RAY_FOLDER, results.values),
        *check_shared_memory(results.values, store_bytes),
    ]
    fine = ", ".join(f"{byte_size(count)} for {name}" for name, count in needed.items())
    unknown = f" and more for {', '.join(needs.unknown)}" if needs.unknown else ""
    return conclude("space", f"free on {_count(nodes)}: {fine}{unknown}, and shared memory", findings)


def worker_nodes(config: RunConfig, runner: NodeRunner) -> Sequence[Node]:
    """Returns the nodes that can hold a worker; all if none can."""
    bundle = bundle_of(config)
    return [node for node in runner.nodes if holds(node.resources, bundle)] or runner.nodes


# Functions for `NodeRunner.map` are lambdas, so that they are pickled by value: by name, a node would have to import
# this module, and torch, to run them.
def _checkpoint_at(place: str) -> Callable[[str], Reach]:
    return lambda _: reach_checkpoint(place)


def _audio_at(source: SourceSpec, allow_paths: Sequence[str]) -> Callable[[str], Reach]:
    return lambda _: reach_audio(source.paths, source.options, allow_paths)


def _count(nodes: Sequence[Node]) -> str:
    return counted(len(nodes), "node")
