"""The node provider of local-autoscaling.yaml; Ray's autoscaler imports it."""

from __future__ import annotations

from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class ProcessesAsNodes(FakeMultiNodeProvider):  # type: ignore[misc]
    """Ray's provider for its own tests, whose nodes are processes of this machine.

    Each node unpacks the files of a job into a folder of its own. With Ray's default, one for all nodes of a machine,
    a node that comes later would remove the folder that the job is running in, and unpack it again.
    """

    def _create_node_with_resources_and_labels(self, node_config: Any, tags: Any, count: int, *what: Any) -> None:
        with self.lock:
            self._made: int = getattr(self, "_made", 0) + 1
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"runtime_resources_{self._made}"
            super()._create_node_with_resources_and_labels(node_config, tags, count, *what)
