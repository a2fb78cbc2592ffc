"""Join the cluster the command was submitted to, or start a local Ray; check that the run fits."""

from __future__ import annotations

import math
import os

import ray
from ray._private.state import available_resources_per_node
from ray.autoscaler.v2.utils import is_autoscaler_v2

# Private, all of these: Ray 2.60 is pinned.
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
from ray.data._internal.stats import get_or_create_stats_actor


def join(cpus: float) -> None:
    """Connect to Ray unless that is done already.

    Under `ray job submit` (RAY_ADDRESS set) this is the cluster of the job. Elsewhere a local
    Ray starts with at least `cpus` logical CPUs, so that a laptop shares its cores rather than waits.
    """
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        _settle_ray_data()
        return
    # Most of a run's processes only wait, and share a core; Ray would warn of their number every few seconds.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(os.cpu_count() or 1, 16)))
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
        # Off, Ray would leak the CPUs of killed trials and controllers (its cleaner lives there).
        include_dashboard=True,
        log_to_driver=False,
        logging_level="ERROR",
    )


def _settle_ray_data() -> None:
    """Start Ray Data's own long-lived actors on this node: each stays where it is first asked for, for good.

    On a node of the autoscaler they would keep it from ever being idle.
    """
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()
    get_or_create_actor_location_tracker()


def has_room(cpus: float, gpus: float, accelerator_type: str | None) -> bool:
    """Whether a node has so much to spare, as far as Ray knows right now."""
    need = {"CPU": cpus, "GPU": gpus, f"accelerator_type:{accelerator_type}": 0.0 if accelerator_type is None else 1e-3}
    return any(
        all(free.get(kind, 0.0) >= amount for kind, amount in need.items())
        for free in available_resources_per_node().values()
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
    most = ray._private.state.state.get_max_resources_from_cluster_config()
    if most is None and is_autoscaler_v2(fetch_from_server=True):
        most = {"CPU": math.inf, "GPU": math.inf}
    return {kind: max(here.get(kind, 0.0), float((most or {}).get(kind, 0.0))) for kind in {*here, *(most or {})}}
