"""Preflight checks of a cluster for a run: everything that the run needs, on every node that needs it."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from mowe_ray.config import RunConfig
from mowe_ray.distributed import cluster, resources
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.preflight.all_reduce import round_trip
from mowe_ray.distributed.preflight.node_checks import (
    NodeRunner,
    alive_nodes,
    check_audio,
    check_checkpoints,
    check_space,
    check_storage,
    check_tracking,
    check_versions,
    within,
)
from mowe_ray.distributed.preflight.requirements import (
    Check,
    check_capacity,
    conclude,
    format_bundle,
    name_nodes,
    needs_of,
)
from mowe_ray.distributed.resources import bundle_of, cpus_of
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import byte_size, counted

# An all-reduce of a step's gradients that takes longer deserves a thought.
_SLOW_S = 1.0
# Calls on the nodes that a check may make one after the other; each has the time limit.
_CALLS = 4


def preflight(config: RunConfig, timeout_s: float) -> Iterator[Check]:
    """Yields the outcome of each check; a failed one prevents only those that depend on it.

    Joins the cluster of RAY_ADDRESS, else starts a local Ray. Meanwhile it holds what the run would reserve, so that
    an autoscaler starts the nodes to look at.

    Args:
        timeout_s: How long to wait for a node's answer, and for nodes to come.
    """
    # A local Ray ends with the thread that has started it; joining one that is not there takes Ray many minutes.
    joined = _check("cluster", timeout_s if "RAY_ADDRESS" in os.environ else None, partial(_join, config))
    yield joined
    if joined.status == "failed":
        return
    capacity = _check("capacity", timeout_s, partial(_capacity, config))
    yield capacity
    group, stored = None, False
    try:
        if capacity.status != "failed":
            # As Ray Train places its workers: together on few nodes where they fit.
            group = placement_group([bundle_of(config)] * config.compute.min_workers, strategy="PACK")
            workers = _check("workers", timeout_s + 10, partial(_wait_for, group, timeout_s))
            yield workers
        for check in _on_every_node(config, timeout_s):
            stored = stored or (check.name == "storage" and check.status != "failed")
            yield check
    finally:
        if group is not None:
            remove_placement_group(group)
    if capacity.status != "failed" and workers.status == "ok":
        yield _check("round trip", None, partial(_round_trip, config, stored, timeout_s))


def _on_every_node(config: RunConfig, timeout_s: float) -> Iterator[Check]:
    runner, limit_s = NodeRunner(alive_nodes(), timeout_s), _CALLS * timeout_s
    yield _check("versions", limit_s, partial(check_versions, runner))
    yield _check("storage", limit_s, partial(check_storage, config, runner))
    yield _check("checkpoints", limit_s, partial(check_checkpoints, config, runner))
    if config.tracking.wandb.mode == "online" or config.tracking.mlflow is not None:
        yield _check("tracking", limit_s, partial(check_tracking, config, runner))
    yield _check("audio", limit_s, partial(check_audio, config, runner))
    yield _check("space", limit_s, lambda: check_space(config, runner, needs_of(config)))


def _check(name: str, limit_s: float | None, run: Callable[[], Check]) -> Check:
    """Returns the outcome of a check; one that raises or takes longer than `limit_s` has failed."""
    try:
        return run() if limit_s is None else within(limit_s, run)
    except Exception as error:  # noqa: BLE001 - Ray, storage libraries and the network each raise their own
        return Check(name, "failed", cause_of(error), _FIXES[name])


_FIXES = {
    "cluster": "start Ray at RAY_ADDRESS, or unset it to use this machine; RAY_AUTH_MODE=token if Ray wants a token",
    "capacity": "ray status tells whether the cluster's head is well",
    "workers": "ray status tells whether the cluster's head is well",
    "versions": "install the packages of constraints.txt on every node",
    "storage": "storage: a folder or URL that every node may write",
    "checkpoints": "model: checkpoints that every node sees",
    "tracking": "tracking: what the trackers need, on every node that may train",
    "audio": "data: shards that every node sees",
    "space": "model, data: what the checks above say",
    "round trip": "open all TCP ports between the nodes, and name their network in the environment of ray start: "
    "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
}


def _join(config: RunConfig) -> Check:
    cluster.join(cpus_of(config, config.compute.max_workers))
    total = ray.cluster_resources()
    has = f"{counted(total.get('CPU', 0.0), 'CPU')}, {counted(total.get('GPU', 0.0), 'GPU')}"
    return Check("cluster", "ok", f"{counted(len(alive_nodes()), 'node')}, {has}")


def _capacity(config: RunConfig) -> Check:
    """Checks that the cluster can hold the run, now or once its autoscaler has added nodes."""
    compute, bundle = config.compute, bundle_of(config)
    findings = check_capacity(
        bundle,
        (compute.min_workers, compute.max_workers),
        cpus_of(config, compute.min_workers),
        [node.resources for node in alive_nodes()],
        resources.maximum_resources(),
    )
    return conclude(
        "capacity", f"room for {counted(compute.min_workers, 'worker')} of {format_bundle(bundle)}", findings
    )


def _wait_for(group: PlacementGroup, timeout_s: float) -> Check:
    """Waits until the nodes of all workers are up and free."""
    if not group.wait(timeout_s):
        detail = f"not to be had within {timeout_s:g} s, so the round trip is left out"
        fix = "wait for other jobs to end and for nodes to start (ray status), or for longer: --timeout"
        return Check("workers", "warning", detail, fix)
    nodes = list(placement_group_table(group)["bundles_to_node_id"].values())
    names = {node.id: node.name for node in alive_nodes()}
    return Check("workers", "ok", f"{len(nodes)} would run on {name_nodes({names[node] for node in nodes})}")


def _round_trip(config: RunConfig, stored: bool, timeout_s: float) -> Check:
    """Starts the workers, which measure an all-reduce."""
    name = f"mowe_ray_preflight_{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix=name) as scratch:
        folder = RunFolder(config.storage if stored else scratch, name)
        try:
            timing = within(timeout_s, partial(round_trip, config, name, folder.storage, timeout_s))
        except TimeoutError:
            # Nothing else is checked after this, so that Ray is not needed any more.
            ray.shutdown()  # ends the workers, which would write into the folder again
            raise
        finally:
            folder.remove("")
    if timing.workers == 1:
        return Check("round trip", "ok", "one worker started, with no other to reach")
    gradients = needs_of(config).gradients
    step_s = timing.seconds(gradients)
    detail = (
        f"{timing.workers} workers on {counted(timing.nodes, 'node')}: {timing.latency_s * 1e3:.2f} ms, "
        f"{timing.bytes_per_s / 1e9:.2f} GB/s; the gradients of a step ({byte_size(gradients)}) take {step_s:.2g} s"
    )
    if step_s > _SLOW_S:
        fix = "a faster network (NCCL_SOCKET_IFNAME), or fewer reductions: training.gradient_accumulation"
        return Check("round trip", "warning", detail, fix)
    return Check("round trip", "ok", detail)
