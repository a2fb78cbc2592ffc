"""Ray Data: index shards and stream decoded micro-batches, in the planned order.

The plan (`data/plan.py`) names the rows of every micro-batch; here CPU tasks anywhere in the cluster
read, decode and pack them, and each rank consumes its own, already in order. Waveforms travel through
the object store as int16 with one scale per clip; features are computed where the model is.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
from ray.data import ExecutionResources

from mowe_ray.data.batch import MicroBatch, load_micro_batch

T = TypeVar("T")
R = TypeVar("R")

# Micro-batches a Ray Data execution runs: long enough that its start (about 0.5 s) does not matter,
# short enough that a rank holds only a small part of the plan.
_PER_EXECUTION = 512
# Micro-batches a task decodes: a task costs some 10 ms of scheduling.
_PER_TASK = 16


def parallel_map(function: Callable[[T], R], items: Iterable[T], in_flight: int = 64) -> Iterator[R]:
    """Apply `function` to `items` in Ray tasks of one CPU, yielding results in order."""
    shared = ray.put(function)
    pending: deque[ray.ObjectRef] = deque()
    for item in items:
        pending.append(_apply.remote(shared, item))
        if len(pending) >= in_flight:
            yield ray.get(pending.popleft())
    while pending:
        yield ray.get(pending.popleft())


@ray.remote(num_cpus=1)
def _apply(function: Callable[[T], R], item: T) -> R:
    return function(item)


def decode_stream(
    index: ray.ObjectRef,
    row_lists: Iterable[np.ndarray],
    *,
    min_duration_s: float,
    max_duration_s: float,
    decode_cpus: float,
) -> Iterator[MicroBatch]:
    """Yield the decoded micro-batch of each array of index rows, in order.

    Args:
        index: The `Index` in the object store; tasks read it in place.
        row_lists: Row numbers of each micro-batch; consumed as the stream goes on.
        decode_cpus: CPUs this stream may use at a time.
    """
    rows_left = iter(row_lists)
    while chunk := list(itertools.islice(rows_left, _PER_EXECUTION)):
        tables = [
            pa.table({"rows": pa.array([r.tolist() for r in chunk[i : i + _PER_TASK]], pa.list_(pa.int64()))})
            for i in range(0, len(chunk), _PER_TASK)
        ]
        dataset = ray.data.from_arrow(tables).map_batches(
            _decode_rows,
            fn_kwargs={"index": index, "min_duration_s": min_duration_s, "max_duration_s": max_duration_s},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
        )
        options = dataset.context.execution_options
        options.preserve_order = True
        options.resource_limits = ExecutionResources.for_limits(cpu=decode_cpus)
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4):
            for row in range(block.num_rows):
                yield MicroBatch.from_row(block, row)


def _decode_rows(
    block: pa.Table, index: ray.ObjectRef, min_duration_s: float, max_duration_s: float
) -> Iterator[pa.Table]:
    table = ray.get(index).table
    for rows in block["rows"]:
        yield load_micro_batch(table.take(rows.values), min_duration_s, max_duration_s).to_row()


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield `items`, computed up to `depth` ahead in a thread; its errors are raised here."""
    done = object()
    ahead: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                if not _put(ahead, item, stop):
                    return
            _put(ahead, done, stop)
        except BaseException as error:  # noqa: BLE001 - handed over to the consumer, which raises it
            _put(ahead, error, stop)

    thread = threading.Thread(target=fill, daemon=True, name="prefetch")
    thread.start()
    try:
        while (item := ahead.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def _put(ahead: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ahead.put(item, timeout=0.2)
        except queue.Full:
            continue
        return True
    return False
