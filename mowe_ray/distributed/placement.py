"""Where decoding runs: where it takes no core, and no node, that training could use."""

from __future__ import annotations

import random
from typing import Any

import ray

# Private; Ray 2.60 is pinned.
from ray._private.state import available_resources_per_node, total_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


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
    total = total_resources_per_node()
    roomy = [
        node
        for node, free in available_resources_per_node().items()
        if free.get("CPU", 0.0) >= 1 and not total.get(node, {}).get("GPU")
    ]
    if not roomy:
        return {"scheduling_strategy": "SPREAD"}
    # What is free is old by a moment: a node that has filled up meanwhile passes the task on.
    there = NodeAffinitySchedulingStrategy(random.choice(roomy), soft=True, _spill_on_unavailable=True)
    return {"scheduling_strategy": there}
