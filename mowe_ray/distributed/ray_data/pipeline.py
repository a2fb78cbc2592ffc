"""Ray Data: index shards and stream decoded micro-batches, in the planned order.

The plan (`data/plan.py`) names the rows of every micro-batch; here CPU tasks (`placement.py` says where)
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
from ray.data import TaskPoolStrategy

from mowe_ray.config import RunConfig
from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.epoch_plan import Rows
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.distributed.resources import decoding_options
from mowe_ray.model import MoweProcessor
from mowe_ray.training.collate import Batch, collate
from mowe_ray.training.datasets import validation_plan
from mowe_ray.training.sampler import EpochSampler, PlannedStep, rows_of_rank, with_batches

T = TypeVar("T")
R = TypeVar("R")

# Micro-batches a Ray Data execution runs. Starting one costs about a second of decoding; up to two are held at a
# time, so this bounds memory: at 120 s a micro-batch, 2 x 2 GB a rank.
_PER_EXECUTION = 512
_AUDIO_BYTES_PER_S = 2 * SAMPLE_RATE
# Micro-batches a task decodes: a task costs some 10 ms of scheduling, and the output of a whole task
# may have to wait for the one before it.
_PER_TASK = 16
# A block is handed over when it is full: Ray's 128 MiB would keep the first micro-batch back for seconds.
_BLOCK_BYTES = 16 << 20


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


# Anywhere in the cluster: inside a Tune trial, tasks would by default run on what the trial has reserved, its driver's.
@ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")
def _apply(function: Callable[[T], R], item: T) -> R:
    return function(item)


def decode_stream(
    index: ray.ObjectRef,
    row_lists: Iterable[np.ndarray],
    *,
    min_duration_s: float,
    max_duration_s: float,
    decode_cpus: int,
    reserved: bool = False,
    per_execution: int = _PER_EXECUTION,
    cache: ray.ObjectRef | None = None,
) -> Iterator[MicroBatch]:
    """Yield the decoded micro-batch of each array of index rows, in order.

    Args:
        index: The `Index` in the object store; tasks read it in place.
        row_lists: Row numbers of each micro-batch; consumed as the stream goes on.
        decode_cpus: Tasks of an execution that run at a time, one CPU each.
        reserved: The caller has reserved these CPUs.
        per_execution: Micro-batches a Ray Data execution runs.
        cache: The `FeatureCache` in the object store, to read from it instead of decoding.
    """
    settings = {"index": index, "cache": cache, "min_duration_s": min_duration_s, "max_duration_s": max_duration_s}
    if cache is not None:  # features are larger than audio: as many bytes, not as many micro-batches
        added = sum(encoder.bytes_per_s for encoder in ray.get(cache).encoders)
        per_execution = max(_PER_TASK, round(per_execution * _AUDIO_BYTES_PER_S / (_AUDIO_BYTES_PER_S + added)))
    rows_left = iter(row_lists)
    running: deque[Iterator[MicroBatch]] = deque()
    while chunk := list(itertools.islice(rows_left, per_execution)):
        # Drained as fast as it decodes: an execution that must wait for its reader spins, and the training step,
        # in the same process, pays for it. The next one starts while this one is read.
        running.append(prefetch(_execute(chunk, settings, decode_cpus, reserved), depth=len(chunk)))
        if len(running) == 2:
            yield from running.popleft()
    while running:
        yield from running.popleft()


def _execute(
    chunk: list[np.ndarray], settings: dict[str, Any], decode_cpus: int, reserved: bool
) -> Iterator[MicroBatch]:
    """Run one Ray Data execution over the micro-batches of `chunk`."""
    # Blocks, not a range: reading a range is a task of one CPU, and there may be none left for it.
    numbers = [pa.table({"id": range(n, min(n + _PER_TASK, len(chunk)))}) for n in range(0, len(chunk), _PER_TASK)]
    dataset = ray.data.from_blocks(numbers).map_batches(
        _decode,
        fn_kwargs={"row_lists": ray.put(chunk), **settings},
        batch_size=None,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=decode_cpus),
        **decoding_options(reserved=reserved),
    )
    context = dataset.context
    context.target_max_block_size = _BLOCK_BYTES
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4):
        for row in range(block.num_rows):
            yield MicroBatch.from_row(block, row)


def _decode(
    numbers: pa.Table,
    index: ray.ObjectRef,
    row_lists: ray.ObjectRef,
    cache: ray.ObjectRef | None,
    min_duration_s: float,
    max_duration_s: float,
) -> Iterator[pa.Table]:
    """Yield the micro-batches of these `numbers`."""
    table, rows = ray.get(index).table, ray.get(row_lists)
    kept = None if cache is None else ray.get(cache)
    for number in numbers["id"].to_pylist():
        taken = table.take(rows[number])
        batch = load_micro_batch(taken, min_duration_s, max_duration_s) if kept is None else kept.load(taken)
        yield batch.to_row()


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Start to compute `items` in a thread, up to `depth` ahead, and return them; its errors are raised there."""
    ahead: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                if not _put(ahead, item, stop):
                    return
            _put(ahead, _DONE, stop)
        except BaseException as error:  # noqa: BLE001 - handed over to the consumer, which raises it
            _put(ahead, error, stop)

    threading.Thread(target=fill, daemon=True, name="prefetch").start()
    return _drain(ahead, stop)


_DONE = object()


def _drain(ahead: queue.Queue[Any], stop: threading.Event) -> Iterator[Any]:
    try:
        while (item := ahead.get()) is not _DONE:
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


# Micro-batches collated ahead of the step that needs them.
_COLLATED_AHEAD = 4


def training_batches(
    index: ray.ObjectRef,
    config: RunConfig,
    processor: MoweProcessor,
    sampler: EpochSampler,
    *,
    cache: ray.ObjectRef | None,
    change: Callable[[list[Rows]], list[Rows]],
    rank: int,
    world_size: int,
) -> Iterator[tuple[PlannedStep, list[Batch]]]:
    """Yield the steps to come with this rank's micro-batches, prepared ahead in a thread.

    Args:
        cache: The `FeatureCache` in the object store, if the run has one.
        change: Returns the micro-batches that are really run for the planned ones of a step; the same on every rank.
    """

    def load(rows: Iterator[Rows]) -> Iterator[Batch]:
        decoded = _decoded(index, rows, config, cache)
        return prefetch((collate(micro_batch, processor) for micro_batch in decoded), _COLLATED_AHEAD)

    return with_batches(sampler, load, change=change, rank=rank, world_size=world_size)


def validation_batches(
    index: ray.ObjectRef, config: RunConfig, *, cache: ray.ObjectRef | None, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of a validation source, equally many on every rank."""
    # One micro-batch a step, distributed over the ranks: the clips of a micro-batch, and so its padding, do not depend
    # on the number of ranks.
    plan = [step[0] for step in validation_plan(ray.get(index), config.data)]
    rows = iter(rows_of_rank(plan, rank, world_size))
    return prefetch(_decoded(index, rows, config, cache), _COLLATED_AHEAD)


def _decoded(
    index: ray.ObjectRef, rows: Iterator[Rows], config: RunConfig, cache: ray.ObjectRef | None
) -> Iterator[MicroBatch]:
    return decode_stream(
        index,
        rows,
        min_duration_s=config.data.min_duration_s,
        max_duration_s=config.data.max_duration_s,
        decode_cpus=config.data.decode_cpus,
        reserved=config.compute.reserves_decoding,
        cache=cache,
    )
