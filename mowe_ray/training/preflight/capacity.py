"""Whether a cluster can ever hold a run: on the nodes it has, and those that its autoscaler may start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mowe_ray.training.preflight.findings import Finding

Resources = Mapping[str, float]

ACCELERATOR = "accelerator_type:"
_KEYS = {"CPU": "compute.cpus_per_worker (or data.decode_cpus)", "GPU": "compute.gpus_per_worker"}


def holds(node: Resources, bundle: Resources) -> int:
    """Return how many workers a node has room for when it is empty."""
    return min(math.floor(node.get(key, 0.0) / least) for key, least in bundle.items())


def told(bundle: Resources) -> str:
    """Say what one worker reserves."""
    parts = [f"{bundle[key]:g} {key}" for key in _countable(bundle)]
    return ", ".join([*parts, *(key.removeprefix(ACCELERATOR) for key in bundle if key.startswith(ACCELERATOR))])


def judge_capacity(
    bundle: Resources, workers: tuple[int, int], cpus: float, nodes: Sequence[Resources], most: Resources
) -> list[Finding]:
    """Compare what the run asks for with what can ever be there.

    Args:
        bundle: What one worker reserves, by Ray's names.
        workers: The fewest and the most.
        cpus: CPUs of the fewest workers and their decoding.
        nodes: What each node has that is there.
        most: What all nodes together may have one day.
    """
    held: float = sum(holds(node, bundle) for node in nodes)
    if any(most.get(key, 0.0) > sum(node.get(key, 0.0) for node in nodes) for key in _countable(bundle)):
        # Of nodes that may come, only their sum is known: neither their size nor their type of accelerator.
        held = max(held, min(_whole(most.get(key, 0.0) / bundle[key]) for key in _countable(bundle)))
    elif not held:
        return [_fits_nowhere(bundle, nodes)]
    if held < workers[0]:
        detail = f"{workers[0]} workers of {told(bundle)} are needed, and there is never room for more than {held:g}"
        return [Finding("failed", detail, "lower compute.num_workers, or raise the autoscaler's maximum of such nodes")]
    findings = []
    if cpus > most.get("CPU", 0.0):
        detail = f"training and decoding need {cpus:g} CPUs, and there will never be more than {most.get('CPU', 0.0):g}"
        findings.append(Finding("failed", detail, "lower data.decode_cpus, or add CPU nodes"))
    if held < workers[1]:
        detail = f"there will never be room for more than {held:g} of {workers[1]} workers"
        fix = "lower the second number of compute.num_workers, or raise the autoscaler's maximum"
        findings.append(Finding("warning", detail, fix))
    return findings


def _fits_nowhere(bundle: Resources, nodes: Sequence[Resources]) -> Finding:
    largest = {key: max((node.get(key, 0.0) for node in nodes), default=0.0) for key in bundle}
    lacking = [key for key, least in bundle.items() if largest[key] < least]
    if any(key.startswith(ACCELERATOR) for key in lacking):
        known = {key.removeprefix(ACCELERATOR) for node in nodes for key in node if key.startswith(ACCELERATOR)}
        have = f"the cluster's accelerators are {', '.join(sorted(known)) or 'none'}"
    elif lacking:
        have = f"the most that one has is {', '.join(f'{largest[key]:g} {key}' for key in lacking)}"
    else:
        have = "none has all of it together"
    keys = dict.fromkeys(_KEYS.get(key, "compute.accelerator_type") for key in lacking or bundle)
    return Finding(
        "failed",
        f"one worker needs {told(bundle)}, and no node will ever have that: {have}",
        f"change {', '.join(keys)}, or add such nodes to the cluster",
    )


def _countable(bundle: Resources) -> list[str]:
    return [key for key in bundle if not key.startswith(ACCELERATOR)]


def _whole(number: float) -> float:
    return math.floor(number) if math.isfinite(number) else number
