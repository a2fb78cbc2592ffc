"""What a run asks of the cluster: the resources of its workers, and where decoding is placed."""

from __future__ import annotations

import math
import random
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mowe_ray.config import RunConfig
from mowe_ray.distributed import ray_internals


def decoding_options(*, reserved: bool) -> dict[str, Any]:
    """Return the options of a Ray Data map whose tasks decode on one CPU each.

    Args:
        reserved: The process that calls this has reserved their CPUs with its own; they run on its node.
    """
    if reserved:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return {"num_cpus": 0, "scheduling_strategy": here}
    # Asked before each task, because nodes come and go. (Deprecated, to be removed in Ray 2.64; 2.60 is pinned.)
    return {"num_cpus": 1, "ray_remote_args_fn": _away_from_gpus}


def _away_from_gpus() -> dict[str, Any]:
    """Choose a node without GPUs that has a CPU to spare; any node if there is none."""
    total = ray_internals.total_resources_per_node()
    roomy = [
        node
        for node, free in ray_internals.available_resources_per_node().items()
        if free.get("CPU", 0.0) >= 1 and not total.get(node, {}).get("GPU")
    ]
    if not roomy:
        return {"scheduling_strategy": "SPREAD"}
    # What is free is old by a moment: a node that has filled up meanwhile passes the task on.
    there = NodeAffinitySchedulingStrategy(random.choice(roomy), soft=True, _spill_on_unavailable=True)
    return {"scheduling_strategy": there}


def cpus_of(config: RunConfig, workers: int) -> int:
    """Return the CPUs that so many workers and their decoding need."""
    return workers * (config.compute.cpus_per_worker + config.data.decode_cpus)


def worker_resources(config: RunConfig) -> dict[str, float]:
    """Return what one worker reserves."""
    compute = config.compute
    cpus = compute.cpus_per_worker + (config.data.decode_cpus if compute.reserves_decoding else 0)
    return {"CPU": cpus, "GPU": compute.gpus_per_worker}


def bundle_of(config: RunConfig) -> dict[str, float]:
    """Return the bundle of a placement group that holds one worker, by Ray's names of resources."""
    kind = config.compute.accelerator_type
    bundle = {key: amount for key, amount in worker_resources(config).items() if amount}
    return bundle if kind is None else {**bundle, f"accelerator_type:{kind}": 0.001}


def has_room(cpus: float, gpus: float, accelerator_type: str | None) -> bool:
    """Whether a node has so much to spare, as far as Ray knows right now."""
    need = {"CPU": cpus, "GPU": gpus, f"accelerator_type:{accelerator_type}": 0.0 if accelerator_type is None else 1e-3}
    return any(
        all(free.get(kind, 0.0) >= amount for kind, amount in need.items())
        for free in ray_internals.available_resources_per_node().values()
    )


def check_resources(cpus: float, gpus: float) -> str | None:
    """Raise if the cluster can never hold the run, which would otherwise wait for ever.

    Args:
        cpus: CPUs of all workers and their decoding.
        gpus: GPUs of all workers.

    Returns:
        What the run has to wait for, if its nodes are still to come.

    Raises:
        ValueError: Names the keys to lower.
    """
    here, most = ray.cluster_resources(), maximum_resources()
    waits = None
    for kind, need, keys in (
        ("CPU", cpus, "compute.num_workers, compute.cpus_per_worker or data.decode_cpus"),
        ("GPU", gpus, "compute.num_workers or compute.gpus_per_worker"),
    ):
        told = f"the run needs {need:g} {kind}s and the cluster has {here.get(kind, 0.0):g}"
        if need > most.get(kind, 0.0):
            raise ValueError(f"{told}: lower {keys}")
        if need > here.get(kind, 0.0):
            waits = f"{told}: waiting for its autoscaler"
    return waits


def maximum_resources() -> dict[str, float]:
    """Return the cluster's resources, with its autoscaler's maximum: infinite where that is told nobody.

    Only Ray's managed clusters tell it. With `ray up` and KubeRay a run for which there will never be enough waits, and
    says so; without an autoscaler it is refused.
    """
    here = ray.cluster_resources()
    most = ray_internals.cluster_state.get_max_resources_from_cluster_config()
    if most is None and ray_internals.is_autoscaler_v2(fetch_from_server=True):
        most = {"CPU": math.inf, "GPU": math.inf}
    return {kind: max(here.get(kind, 0.0), float((most or {}).get(kind, 0.0))) for kind in {*here, *(most or {})}}
