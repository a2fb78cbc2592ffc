"""Ranks that are threads of one process: for tests of what needs collectives but no process group."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from mowe_ray.training.protocols import Ranks

T = TypeVar("T")


def thread_ranks(world_size: int, log: Callable[[str], object] = print) -> list[Ranks]:
    """Return the rank contexts of `world_size` threads that meet in every collective."""
    barrier = threading.Barrier(world_size, timeout=60)
    values: list[Any] = [None] * world_size

    def context(rank: int) -> Ranks:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()  # nobody writes the next value before all have read this one
            return gathered

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            return torch.stack(gather(tensor)).sum(0)

        return Ranks(rank, world_size, gather, all_reduce, log)

    return [context(rank) for rank in range(world_size)]


def on_ranks(world_size: int, work: Callable[[Ranks], T], log: Callable[[str], object] = print) -> list[T]:
    """Call `work` as each rank, at the same time; returns the results by rank."""
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(work, thread_ranks(world_size, log)))
