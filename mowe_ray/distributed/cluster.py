"""Join the cluster the command was submitted to, or start a local Ray; check that the run fits."""

from __future__ import annotations

import math
import os

import ray
from ray._private.state import available_resources_per_node


def join(cpus: float) -> None:
    """Connect to Ray unless that is done already.

    Under `ray job submit` (RAY_ADDRESS set) this is the cluster of the job. Elsewhere a local
    Ray starts with at least `cpus` logical CPUs, so that a laptop shares its cores rather than waits.
    """
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
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


def has_room(cpus: float, gpus: float, accelerator_type: str | None) -> bool:
    """Whether a node has so much to spare, as far as Ray knows right now."""
    need = {"CPU": cpus, "GPU": gpus, f"accelerator_type:{accelerator_type}": 0.0 if accelerator_type is None else 1e-3}
    return any(
        all(free.get(kind, 0.0) >= amount for kind, amount in need.items())
        for free in available_resources_per_node().values()
    )


def check_resources(cpus: float, gpus: float) -> None:
    """Raise if the cluster can never hold the run, which would otherwise wait for ever.

    Args:
        cpus: CPUs of all workers and their decoding.
        gpus: GPUs of all workers.

    Raises:
        ValueError: Names the keys to lower.
    """
    total = ray.cluster_resources()
    for kind, need, keys in (
        ("CPU", cpus, "compute.num_workers, compute.cpus_per_worker or data.decode_cpus"),
        ("GPU", gpus, "compute.num_workers or compute.gpus_per_worker"),
    ):
        if need > total.get(kind, 0.0):
            raise ValueError(
                f"the run needs {need:g} {kind}s and the cluster has {total.get(kind, 0.0):g}: lower {keys}"
            )


def maximum_resources() -> dict[str, float]:
    """Return the cluster's resources, with the autoscaler's maximum where it has one."""
    here, most = ray.cluster_resources(), ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {key: max(here.get(key, 0.0), float(most.get(key, 0.0))) for key in {**here, **most}}
