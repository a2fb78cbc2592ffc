"""The private parts of Ray that this package needs, in one place; Ray 2.60 is pinned because of them.

Each is imported on first use, so that a process pays only for what it uses: `ray.train` takes seconds to import, and a
task that decodes audio does not need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray._private import ray_constants
    from ray._private.state import available_resources_per_node, total_resources_per_node
    from ray._private.state import state as cluster_state
    from ray._private.worker import global_worker
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.context import get_train_context

__all__ = [
    "HEAD_NODE",
    "WorkerCallback",
    "WorkerGroupCallback",
    "available_resources_per_node",
    "cluster_state",
    "get_or_create_actor_location_tracker",
    "get_or_create_autoscaling_coordinator",
    "get_or_create_stats_actor",
    "get_train_context",
    "global_worker",
    "is_autoscaler_v2",
    "ray_constants",
    "total_resources_per_node",
]

HEAD_NODE = "node:__internal_head__"
"""Resource that only the head node has, 1.0 of it. Without it a study's drivers may land on a spot machine."""

_SOURCES = {
    # `ENABLE_RAY_CLUSTER`: whether Ray uses the machine's address in the network. `_node_ip_address="127.0.0.1"` is
    # replaced by that address. Without it, the servers of a local Ray listen to the network.
    "ray_constants": ("ray._private", "ray_constants"),
    # What each node has to spare. The public `ray.available_resources` adds all nodes up: decoding would crowd the
    # nodes with GPUs, and async validation could not know whether one node has room for it.
    "available_resources_per_node": ("ray._private.state", "available_resources_per_node"),
    "total_resources_per_node": ("ray._private.state", "total_resources_per_node"),
    # `get_max_resources_from_cluster_config`: how far an autoscaler may go. Without both of these, a run that needs
    # nodes that are still to come is refused.
    "cluster_state": ("ray._private.state", "state"),
    "is_autoscaler_v2": ("ray.autoscaler.v2.utils", "is_autoscaler_v2"),
    # `core_worker.get_current_task_attempt_number()`. Ray Data tries a task whose process died again for ever; without
    # the number it would die for ever.
    "global_worker": ("ray._private.worker", "global_worker"),
    # Ray Data's long-lived actors stay on the node that first needs them. Unless they are started on the head, they
    # keep a node of the autoscaler from ever being idle.
    "get_or_create_autoscaling_coordinator": (
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
        "get_or_create_autoscaling_coordinator",
    ),
    "get_or_create_actor_location_tracker": (
        "ray.data._internal.execution.node_trackers",
        "get_or_create_actor_location_tracker",
    ),
    "get_or_create_stats_actor": ("ray.data._internal.stats", "get_or_create_stats_actor"),
    # Runs code in a worker's main thread, the only one that can handle SIGTERM. Without it a worker that is terminated
    # ends without a checkpoint.
    "WorkerCallback": ("ray.train.v2._internal.execution.callback", "WorkerCallback"),
    # Tells when a worker group starts and ends, and its placement group. Without it the resources of a run whose
    # controller has died stay reserved, and a run that waits for nodes cannot be stopped.
    "WorkerGroupCallback": ("ray.train.v2._internal.execution.callback", "WorkerGroupCallback"),
    # The notice that a node will be taken away. The public `ray.train.get_preemption_info` is a barrier of its own in
    # every step.
    "get_train_context": ("ray.train.v2._internal.execution.context", "get_train_context"),
}


def __getattr__(name: str) -> Any:
    """Import a private name on first use (PEP 562)."""
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    return globals().setdefault(name, getattr(import_module(module), attribute))
