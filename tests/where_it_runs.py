"""Prints, as JSON, on which nodes of the cluster at RAY_ADDRESS decoding and workers land.

python -m tests.where_it_runs SHARDS
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.state import list_tasks

from mowe_ray.config import load_config
from mowe_ray.data.index import Index
from mowe_ray.distributed import cluster
from mowe_ray.distributed.ray_data.parallel_map import parallel_map
from mowe_ray.distributed.ray_data.pipeline import decode_stream
from mowe_ray.distributed.resources import bundle_of
from mowe_ray.training.datasets import index_sources

TASKS = 6


def main() -> None:
    cluster.join(1)
    index = index_sources(load_config("quickstart", [f"data.train=[{{path: {sys.argv[1]}}}]"]).data, parallel_map).train
    found = {
        "any": workers("compute.gpus_per_worker=1", "compute.num_workers=2"),
        "A100": workers("compute.gpus_per_worker=1", "compute.accelerator_type=A100"),
        "reserved": decoding(index, gpus=0, reserved=True),
        "beside a GPU": decoding(index, gpus=1, reserved=False),
    }
    sys.stdout.write(json.dumps(found))


def decoding(index: Index, *, gpus: int, reserved: bool) -> tuple[str, dict[str, int]]:
    """Return where a reader ran, and how many of the tasks it decoded with ran where."""
    rows = [np.array([number % len(index)]) for number in range(16 * TASKS)]
    known = _decoding()
    with held(f"compute.gpus_per_worker={gpus}") as bundle:
        reader = ray.remote(_read).options(num_cpus=1, num_gpus=gpus, scheduling_strategy=bundle)
        node = ray.get(reader.remote(index, rows, reserved))
    deadline = time.monotonic() + 30
    while len(nodes := [at for task, at in _decoding().items() if task not in known]) < TASKS:
        assert time.monotonic() < deadline, nodes  # Ray learns of what its workers did a second later
        time.sleep(0.2)
    return _names()[node], dict(Counter(_names()[at] for at in nodes))


def _read(index: Index, rows: list[np.ndarray], reserved: bool) -> str:
    stream = decode_stream(
        ray.put(index), rows, min_duration_s=0.1, max_duration_s=12.0, decode_cpus=1, reserved=reserved
    )
    assert sum(1 for _ in stream) == len(rows)
    return str(ray.get_runtime_context().get_node_id())


def _decoding() -> dict[str, str]:
    """Return the node of each task that has decoded so far."""
    tasks = list_tasks(
        filters=[("name", "=", "MapBatches(decode_micro_batches)"), ("state", "=", "FINISHED")], detail=True
    )
    return {task.task_id: task.node_id for task in tasks}


def workers(*overrides: str) -> list[str]:
    """Return the nodes that the workers of a run would be placed on."""
    with held(*overrides) as bundle:
        nodes = placement_group_table(bundle.placement_group)["bundles_to_node_id"].values()
        return sorted(_names()[node] for node in nodes)


@contextmanager
def held(*overrides: str) -> Iterator[PlacementGroupSchedulingStrategy]:
    """Hold what Ray Train would for the workers of a run."""
    config = load_config("quickstart", overrides)
    group = placement_group([bundle_of(config)] * config.compute.max_workers, strategy="PACK")
    assert group.wait(30), bundle_of(config)
    yield PlacementGroupSchedulingStrategy(group)
    remove_placement_group(group)


def _names() -> dict[str, str]:
    return {node["NodeID"]: node["NodeName"] for node in ray.nodes()}


if __name__ == "__main__":
    main()
