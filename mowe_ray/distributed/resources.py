"""Resources that a run reserves: the bundle of a worker, the total of a run, and whether the cluster has room."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import ray

from mowe_ray.config import RunConfig
from mowe_ray.config.schema import WorkersSection
from mowe_ray.distributed import ray_internals

Resources = Mapping[str, float]
_ACCELERATOR = "accelerator_type:"


def worker_bundle(compute: WorkersSection, reserved_decode_cpus: int = 0) -> dict[str, float]:
    """Return what one worker reserves on its node, by Ray's names of resources.

    Args:
        compute: CPUs, GPUs and the type of GPU of a worker.
        reserved_decode_cpus: CPUs for decoding that the worker reserves together with its own.
    """
    bundle: dict[str, float] = {"CPU": compute.cpus_per_worker + reserved_decode_cpus}
    if compute.gpus_per_worker:
        bundle["GPU"] = compute.gpus_per_worker
    if compute.accelerator_type is not None:
        bundle[f"{_ACCELERATOR}{compute.accelerator_type}"] = 0.001  # as Ray itself asks for a type
    return bundle


def bundle_of(config: RunConfig) -> dict[str, float]:
    """Return what one training process reserves: its decoding too, except on GPU nodes."""
    return worker_bundle(config.compute, config.data.decode_cpus if config.compute.reserves_decoding else 0)


def unreserved_decode_cpus(config: RunConfig) -> int:
    """Return the CPUs that decode for one worker on any node, besides its bundle."""
    return 0 if config.compute.reserves_decoding else config.data.decode_cpus


def total_resources(compute: WorkersSection, decode_cpus: int, workers: int) -> dict[str, float]:
    """Return the CPUs and GPUs of so many workers and their decoding, wherever that runs."""
    return {
        "CPU": workers * (compute.cpus_per_worker + decode_cpus),
        "GPU": workers * compute.gpus_per_worker,
    }


def cpus_of(config: RunConfig, workers: int) -> int:
    """Return the CPUs that so many workers of a run and their decoding need."""
    return int(total_resources(config.compute, config.data.decode_cpus, workers)["CPU"])


def ray_options(bundle: Resources) -> dict[str, Any]:
    """Return the options with which a Ray task or actor reserves `bundle`."""
    types = [name.removeprefix(_ACCELERATOR) for name in bundle if name.startswith(_ACCELERATOR)]
    return {
        "num_cpus": bundle["CPU"],
        "num_gpus": bundle.get("GPU", 0),
        **({"accelerator_type": types[0]} if types else {}),
    }


def fits(bundle: Resources, free: Iterable[Resources], elsewhere_cpus: int = 0) -> bool:
    """Whether a node has `bundle` to spare, and the nodes together `elsewhere_cpus` whole CPUs besides.

    Args:
        bundle: What is reserved on one node.
        free: What every node has to spare, by Ray's names.
        elsewhere_cpus: CPUs of tasks that take one each, on any node.
    """
    nodes = list(free)
    # Rounded down by node: a task of one CPU cannot be spread over the fractions of two nodes.
    cpus = sum(math.floor(node.get("CPU", 0.0)) for node in nodes)
    return any(
        all(node.get(kind, 0.0) >= amount for kind, amount in bundle.items())
        and cpus - math.floor(node.get("CPU", 0.0)) + math.floor(node.get("CPU", 0.0) - bundle.get("CPU", 0.0))
        >= elsewhere_cpus
        for node in nodes
    )


def has_room(bundle: Resources, elsewhere_cpus: int = 0) -> bool:
    """Whether the cluster `fits` so much besides what is reserved, as far as Ray knows at this moment."""
    return fits(bundle, ray_internals.available_resources_per_node().values(), elsewhere_cpus)


def times_that_fit(need: Resources, total: Resources) -> float:
    """Return how often `need` fits into `total`: a whole number, or infinity."""
    # A quotient of infinity is infinite; `inf // 4` is not a number.
    times = min(total.get(kind, 0.0) / amount for kind, amount in need.items() if amount)
    return math.floor(times) if math.isfinite(times) else times


def shortage(need: Resources, here: Resources, maximum: Resources) -> str | None:
    """Return what a run has to wait for, None if the cluster holds it now.

    Args:
        need: CPUs and GPUs of all workers and their decoding.
        here: What the cluster has.
        maximum: What it may have one day, with its autoscaler.

    Raises:
        ValueError: The cluster can never hold the run, which would otherwise wait for ever; names the keys to lower.
    """
    waits = None
    for kind, keys in (
        ("CPU", "compute.num_workers, compute.cpus_per_worker or data.decode_cpus"),
        ("GPU", "compute.num_workers or compute.gpus_per_worker"),
    ):
        amount = need.get(kind, 0.0)
        message = f"the run needs {amount:g} {kind}s and the cluster has {here.get(kind, 0.0):g}"
        if amount > maximum.get(kind, 0.0):
            raise ValueError(f"{message}: lower {keys}")
        if amount > here.get(kind, 0.0):
            waits = f"{message}: waiting for its autoscaler"
    return waits


def check_resources(need: Resources) -> str | None:
    """Return the `shortage` of this cluster, or raise if it can never hold the run."""
    return shortage(need, ray.cluster_resources(), maximum_resources())


def maximum_resources() -> dict[str, float]:
    """Return the cluster's resources including its autoscaler's maximum; infinite where that is unknown.

    Only Ray's managed clusters publish it. With `ray up` and KubeRay a run that can never start therefore waits, and
    says so; without an autoscaler it is refused.
    """
    here = ray.cluster_resources()
    most = ray_internals.cluster_state.get_max_resources_from_cluster_config()
    if most is None and ray_internals.is_autoscaler_v2(fetch_from_server=True):
        most = {"CPU": math.inf, "GPU": math.inf}
    return {kind: max(here.get(kind, 0.0), float((most or {}).get(kind, 0.0))) for kind in {*here, *(most or {})}}
