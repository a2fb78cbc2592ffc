"""An all-reduce test: start the workers as training would, and time sums over all of them (as nccl-tests does)."""

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
class AllReduceTiming:
    """How fast the workers reduce a tensor over all of them.

    Attributes:
        workers: Number of workers.
        nodes: Number of machines that they ran on.
        latency_s: Time of an all-reduce of one number, in seconds.
        bytes_per_s: Rate at which each worker sends, and receives, in a large one.
    """

    workers: int
    nodes: int
    latency_s: float
    bytes_per_s: float

    def seconds(self, size: int) -> float:
        """Returns the estimated time of an all-reduce of `size` bytes, in seconds."""
        return self.latency_s + (_bytes_sent(size, self.workers) / self.bytes_per_s if self.bytes_per_s else 0.0)


def round_trip(config: RunConfig, name: str, storage: str, timeout_s: float) -> AllReduceTiming:
    """Starts the run's workers and times an all-reduce; blocks for ever if they never start.

    Args:
        name: Name of the folder that Ray makes in `storage`.
        timeout_s: How long workers wait for each other, in seconds.

    Raises:
        ValueError: They did not start, do not reach each other, or compute a wrong sum.
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
    return AllReduceTiming(**result)


def _worker() -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    device, workers = get_device(), dist.get_world_size()
    ranks = torch.full((1,), float(dist.get_rank()), device=device)
    dist.all_reduce(ranks)
    # The sum 0 + 1 + ... shows that every worker took part, once.
    if ranks.item() != workers * (workers - 1) / 2:
        raise ValueError(f"the ranks of {workers} workers add up to {ranks.item():g}")
    hosts: list[str | None] = [None] * workers
    dist.all_gather_object(hosts, ray.get_runtime_context().get_node_id())
    seconds = _seconds(torch.zeros(_LARGE, device=device), _LARGE_REPEATS)
    return {
        "workers": workers,
        "nodes": len(set(hosts)),
        "latency_s": _seconds(torch.zeros(1, device=device), _SMALL_REPEATS),
        "bytes_per_s": _bytes_sent(4 * _LARGE, workers) / seconds,
    }


def _seconds(tensor: Any, repeats: int) -> float:
    """Returns the time of one all-reduce, after one that sets up the connections."""
    import torch.distributed as dist

    dist.all_reduce(tensor)
    tensor.sum().item()  # waits for the device
    began = time.monotonic()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    tensor.sum().item()
    return (time.monotonic() - began) / repeats


def _bytes_sent(size: int, workers: int) -> float:
    """Returns the bytes that each of the workers sends, and receives, in a ring all-reduce of `size` bytes."""
    return 2 * (workers - 1) / workers * size
