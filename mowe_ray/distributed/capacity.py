"""Whether the cluster can ever hold a run: its nodes, and those that its autoscaler may add."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from mowe_ray.config import RunConfig
from mowe_ray.distributed.fitting import worker_resources
from mowe_ray.distributed.trainer import cpus_of
from mowe_ray.training.preflight.findings import Finding

_KEYS = {"CPU": "compute.cpus_per_worker (or data.decode_cpus)", "GPU": "compute.gpus_per_worker"}
_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class NodeKind:
    """So many nodes (math.inf: any number) with these resources each."""

    resources: Mapping[str, float]
    count: float
    planned: bool = False

    def holds(self, bundle: Mapping[str, float]) -> int:
        """Return how many workers one of them holds."""
        # What a node will say of its accelerator is not known before it is there.
        asked = {key: least for key, least in bundle.items() if not (self.planned and key.startswith(_ACCELERATOR))}
        return min(math.floor(self.resources.get(key, 0.0) / least) for key, least in asked.items())

    def workers(self, bundle: Mapping[str, float]) -> float:
        """Return how many workers all of them hold."""
        return self.count * self.holds(bundle) if self.holds(bundle) else 0.0


def bundle_of(config: RunConfig) -> dict[str, float]:
    """Return what one worker reserves."""
    bundle = {key: float(amount) for key, amount in worker_resources(config).items() if amount}
    if config.compute.accelerator_type is not None:
        bundle[f"{_ACCELERATOR}{config.compute.accelerator_type}"] = 0.001  # as Ray asks
    return bundle


def planned_nodes() -> list[NodeKind]:
    """Return the kinds of nodes that the autoscaler may start, those that are there among them; none without one."""
    config = ray._private.state.state.get_cluster_config()
    return [
        NodeKind(dict(group.resources), math.inf if group.max_count < 0 else group.max_count, planned=True)
        for group in (config.node_group_configs if config else ())
    ]


def judge_capacity(
    config: RunConfig, alive: Sequence[NodeKind], planned: Sequence[NodeKind], most: Mapping[str, float]
) -> list[Finding]:
    """Compare what the run asks for with what can ever be there.

    Args:
        alive: Nodes that are there.
        planned: Kinds of nodes that may be there one day.
        most: The cluster's resources with the autoscaler's maximum.
    """
    compute, bundle = config.compute, bundle_of(config)
    if not any(kind.holds(bundle) for kind in [*alive, *planned]):
        return [_fits_nowhere(bundle, [*alive, *planned])]
    held = max(sum(kind.workers(bundle) for kind in kinds) for kinds in (alive, planned))
    if held < compute.min_workers:
        return [
            Finding(
                "failed",
                f"the run needs {compute.min_workers} workers of {told(bundle)}, and the cluster will never hold more "
                f"than {held:g}",
                "lower compute.num_workers, or raise the autoscaler's maximum of such nodes",
            )
        ]
    findings = []
    cpus = cpus_of(config, compute.min_workers)
    if cpus > most.get("CPU", 0.0):
        findings.append(
            Finding(
                "failed",
                f"training and decoding need {cpus} CPUs, and the cluster will never have more than "
                f"{most.get('CPU', 0.0):g}",
                "lower data.decode_cpus or compute.cpus_per_worker, or add CPU nodes",
            )
        )
    if held < compute.max_workers:
        findings.append(
            Finding(
                "warning",
                f"the cluster will never hold more than {held:g} of {compute.max_workers} workers",
                "lower the second number of compute.num_workers, or raise the autoscaler's maximum",
            )
        )
    return findings


def told(bundle: Mapping[str, float]) -> str:
    """Say what one worker reserves."""
    parts = [f"{amount:g} {key}" for key, amount in bundle.items() if not key.startswith(_ACCELERATOR)]
    return ", ".join([*parts, *(key.removeprefix(_ACCELERATOR) for key in bundle if key.startswith(_ACCELERATOR))])


def _fits_nowhere(bundle: Mapping[str, float], kinds: Sequence[NodeKind]) -> Finding:
    largest = {key: max((kind.resources.get(key, 0.0) for kind in kinds), default=0.0) for key in bundle}
    lacking = [key for key, least in bundle.items() if largest[key] < least]
    known = sorted({key for kind in kinds for key in kind.resources if key.startswith(_ACCELERATOR)})
    if any(key.startswith(_ACCELERATOR) for key in lacking):
        have = f"the cluster knows {', '.join(key.removeprefix(_ACCELERATOR) for key in known) or 'no accelerator'}"
    elif lacking:
        have = f"the most that one has is {', '.join(f'{largest[key]:g} {key}' for key in lacking)}"
    else:
        have = "none has all of it together"
    keys = {
        "compute.accelerator_type" if key.startswith(_ACCELERATOR) else _KEYS[key]: None for key in lacking or bundle
    }
    return Finding(
        "failed",
        f"one worker needs {told(bundle)}, and no node will ever have that: {have}",
        f"change {', '.join(keys)}, or add such nodes to the cluster",
    )
