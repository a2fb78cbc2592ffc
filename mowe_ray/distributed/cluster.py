"""Join the cluster the command was submitted to, or start a local Ray."""

from __future__ import annotations

import math
import os

import ray

from mowe_ray.distributed import ray_internals


def join(cpus: float) -> None:
    """Connect to Ray unless that is done already.

    Under `ray job submit` (RAY_ADDRESS set) this is the cluster of the job. Elsewhere a local
    Ray starts with at least `cpus` logical CPUs, so that a laptop's tasks share its cores.
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
    """Start Ray Data's own long-lived actors on this node: each stays for good on the node where it is first used.

    On a node of the autoscaler they would keep it from ever being idle.
    """
    ray_internals.get_or_create_stats_actor()
    ray_internals.get_or_create_autoscaling_coordinator()
    ray_internals.get_or_create_actor_location_tracker()
