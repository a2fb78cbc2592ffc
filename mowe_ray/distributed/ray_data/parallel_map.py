"""Ray tasks over a list of items, in order, which survive an item that ends its process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ray

from mowe_ray.distributed import ray_internals

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(function: Callable[..., R], items: Iterable[T], in_flight: int = 64) -> Iterator[R]:
    """Applies `function` to `items` in Ray tasks of one CPU; yields the results in order.

    Args:
        function: Called with `in_child=True` for an item that has ended two processes.
    """
    # Once, not with every task: the function may hold a large closure.
    shared = ray.put(function)
    # Bounded: results that wait for their turn take memory in the object store.
    pending: deque[ray.ObjectRef] = deque()
    for item in items:
        pending.append(_apply.remote(shared, item))
        if len(pending) >= in_flight:
            yield ray.get(pending.popleft())
    while pending:
        yield ray.get(pending.popleft())


# Anywhere in the cluster: inside a Tune trial, tasks would by default run on what the trial has reserved, its driver's.
@ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")
def _apply(function: Callable[..., R], item: T) -> R:
    return function(item, in_child=True) if has_died_twice() else function(item)


def has_died_twice() -> bool:
    """Whether two processes that ran the present task have ended before it was done.

    The second time it is hardly the machine's fault: something in its data may end whoever decodes it.
    """
    return int(ray_internals.global_worker.core_worker.get_current_task_attempt_number()) >= 2
