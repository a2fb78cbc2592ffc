"""Start the workers as training would, and let them add up a tensor: do they reach each other, and how fast?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from mowe_ray.config import RunConfig
from mowe_ray.distributed.errors import format_training_failure
from mowe_ray.distributed.ray_train.worker_group import backend, scaling

_LARGE = 16 << 20  # fp32 numbers
_SMALL_REPEATS, _LARGE_REPEATS = 50, 4


@dataclass(frozen=True)
class RoundTrip:
    """How an all-reduce of the workers went.

    Attributes:
        workers, nodes: How many took part, on how many machines.
        latency_s: Time of an all-reduce of one number.
        bytes_per_s: What a worker sends, and receives, during a large one.
    """

    workers: int
    nodes: int
    latency_s: float
    bytes_per_s: float

    def seconds(self, size: int) -> float:
        """Return how long an all-reduce of so many bytes takes."""
        return self.latency_s + (_travelling(size, self.workers) / self.bytes_per_s if self.bytes_per_s else 0.0)


def round_trip(config: RunConfig, name: str, storage: str, timeout_s: float) -> RoundTrip:
    """Start the run's workers and measure; blocks for ever if they never start.

    Args:
        name: Of the folder that Ray makes in `storage`.
        timeout_s: After so long a wait for each other, the workers give up.

    Raises:
        ValueError: They did not start, do not reach each other, or add up wrongly.
    """
    trainer = TorchTrainer(
        _worker,
        torch_config=backend(config, max(1, int(timeout_s))),
        scaling_config=scaling(config, config.compute.min_workers),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        result: dict[str, Any] = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise ValueError(format_training_failure(error).strip()) from error
    return RoundTrip(**result)


def _worker() -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    device, workers = get_device(), dist.get_world_size()
    ranks = torch.full((1,), float(dist.get_rank()), device=device)
    dist.all_reduce(ranks)
    if ranks.item() != workers * (workers - 1) / 2:
        raise ValueError(f"the ranks of {workers} workers add up to {ranks.item():g}")
    hosts: list[str | None] = [None] * workers
    dist.all_gather_object(hosts, ray.get_runtime_context().get_node_id())
    seconds = _seconds(torch.zeros(_LARGE, device=device), _LARGE_REPEATS)
    return {
        "workers": workers,
        "nodes": len(set(hosts)),
        "latency_s": _seconds(torch.zeros(1, device=device), _SMALL_REPEATS),
        "bytes_per_s": _travelling(4 * _LARGE, workers) / seconds,
    }


def _seconds(tensor: Any, repeats: int) -> float:
    """Return the time of one all-reduce, after one that sets up the connections."""
    import torch.distributed as dist

    dist.all_reduce(tensor)
    tensor.sum().item()  # waits for the device
    began = time.monotonic()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    tensor.sum().item()
    return (time.monotonic() - began) / repeats


def _travelling(size: int, workers: int) -> float:
    """Return the bytes that each of the workers sends, and receives, in a ring all-reduce of `size` bytes."""
    return 2 * (workers - 1) / workers * size
