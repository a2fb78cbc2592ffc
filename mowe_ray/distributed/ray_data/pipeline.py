"""Ray Data: decode samples on any CPUs of the cluster, and run models on them, in the planned order.

`stream_blocks` builds and runs every Ray Data pipeline of this package: blocks of work, tasks that decode them, and,
for evaluation and feature extraction, actors that hold a model. `decode_stream` runs it for training: the epoch plan
(`data/epoch_plan.py`) names the rows of every micro-batch, and each rank consumes its own, already in order. Waveforms
travel through the object store as int16 with one scale per clip; features are computed where the model is.

Processes that decode import this module, and pay for what it imports: no torch here.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mowe_ray.config import RunConfig
from mowe_ray.config.schema import WorkersSection
from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.epoch_plan import Rows
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import MicroBatch, load_in_child, load_micro_batch, without_known
from mowe_ray.data.sample import BadSample
from mowe_ray.data.shards.storage import with_storage_timeout
from mowe_ray.distributed import ray_internals
from mowe_ray.distributed.ray_data.parallel_map import has_died_twice
from mowe_ray.distributed.resources import ray_options, worker_bundle
from mowe_ray.training.datasets import validation_plan

if TYPE_CHECKING:
    from mowe_ray.model import MoweProcessor
    from mowe_ray.training.collate import Batch
    from mowe_ray.training.sampler import EpochSampler, PlannedStep

T = TypeVar("T")


@dataclass(frozen=True)
class ModelActors:
    """The stage of a pipeline that runs a model on what was decoded.

    Attributes:
        model: A class; an instance is made in every actor, and called with blocks.
        arguments: Of its constructor, by keyword.
        compute: How many actors there are, and what each reserves.
    """

    model: type[Callable[[pa.Table], pa.Table]]
    arguments: dict[str, Any]
    compute: WorkersSection


def stream_blocks(
    blocks: Sequence[pa.Table],
    decode: Callable[..., pa.Table | Iterator[pa.Table]],
    arguments: dict[str, Any],
    *,
    decode_cpus: int,
    preserve_order: bool,
    reserved: bool = False,
    actors: ModelActors | None = None,
    block_bytes: int | None = None,
    prefetch_batches: int = 1,
) -> Iterator[pa.Table]:
    """Runs one Ray Data execution: blocks of work, tasks that decode them, and actors that run a model on the result.

    Args:
        blocks: The work. Not a range: to read one is a task of one CPU, and there may be none left for it.
        decode: Returns, or yields, the decoded block; called as `decode(block, **arguments)`.
        decode_cpus: Tasks that run at a time, one CPU each.
        preserve_order: Yield in the order of `blocks`, else as they are done.
        reserved: The process that calls this has reserved the CPUs with its own; the tasks run on its node.
        actors: The second stage; None leaves it out.
        block_bytes: Size from which on a part of a task's output is handed over; None is Ray's 128 MiB.
        prefetch_batches: Blocks that are fetched to this process ahead of their use.
    """
    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    dataset = ray.data.from_blocks(list(blocks)).map_batches(
        decode,
        fn_kwargs=arguments,
        compute=TaskPoolStrategy(size=decode_cpus),
        **_decoding_options(reserved=reserved),
        **options,
    )
    if actors is not None:
        compute = actors.compute
        dataset = dataset.map_batches(
            actors.model,
            fn_constructor_kwargs=actors.arguments,
            compute=ActorPoolStrategy(min_size=compute.min_workers, max_size=compute.max_workers),
            **ray_options(worker_bundle(compute)),
            **options,
        )
    context = dataset.context
    if block_bytes is not None:
        context.target_max_block_size = block_bytes
    context.execution_options.preserve_order = preserve_order
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch_batches)


def _decoding_options(*, reserved: bool) -> dict[str, Any]:
    if reserved:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # The worker's own bundle holds these CPUs already; to reserve them again would need twice as many.
        return {"num_cpus": 0, "scheduling_strategy": here}
    return {"num_cpus": 1, **_away_from_gpus()}


def _away_from_gpus() -> dict[str, Any]:
    """Prefers nodes without GPUs that have a CPU to spare, then any node.

    GPU nodes that join later are not known: those of this run restart its workers, and so its pipelines.
    """
    gpu_nodes = [node for node, total in ray_internals.total_resources_per_node().items() if total.get("GPU")]
    if not gpu_nodes:
        return {}
    elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(gpu_nodes))})"}
    return {"label_selector": elsewhere, "fallback_strategy": [{"label_selector": {}}]}


def decode_micro_batches(
    work: pa.Table,
    indexes: Sequence[ray.ObjectRef],
    plans: ray.ObjectRef,
    cache: ray.ObjectRef | None,
    min_duration_s: float,
    max_duration_s: float,
    storage_timeout_s: float,
    known: Sequence[BadSample] = (),
) -> Iterator[pa.Table]:
    """Yields the decoded micro-batches of a block of work, a table of one row each with the column `dataset`.

    Args:
        work: Columns `dataset` and `number`, of the plan and of the micro-batch in it.
        indexes: The `Index` of each dataset in the object store; tasks read it in place.
        plans: For each dataset the rows of its micro-batches.
        cache: The `FeatureCache` in the object store, to read from it instead of decoding.
        known: Samples that are bad, and not to be tried.
    """
    rows, features = ray.get(plans), None if cache is None else ray.get(cache)
    load = load_in_child if has_died_twice() else load_micro_batch
    for item in work.to_pylist():
        dataset, number = item["dataset"], item["number"]
        samples, bad = without_known(_index(indexes[dataset]).take(rows[dataset][number]), known)
        if features is None:
            batch = with_storage_timeout(storage_timeout_s, load, samples, min_duration_s, max_duration_s)
        else:
            batch = features.load(samples)
        batch.bad.extend(bad)
        yield batch.to_row().append_column("dataset", pa.array([dataset]))


@lru_cache(maxsize=4)  # each holds its object in the store: of a run, and of studies and evaluations in one process
def _index(reference: ray.ObjectRef) -> Index:
    """Return an index in the object store; unpacked once a process, since it has an array for each chunk and column."""
    index: Index = ray.get(reference)
    return index


# Micro-batches a Ray Data execution runs, at most: starting one costs about a second of decoding.
_PER_EXECUTION = 512
_AUDIO_BYTES_PER_S = 2 * SAMPLE_RATE
# Micro-batches a task decodes: a task costs some 10 ms of scheduling, and the output of a whole task
# may have to wait for the one before it.
_PER_TASK = 16
# A block is handed over when it is full: Ray's 128 MiB would keep the first micro-batch back for seconds.
_BLOCK_BYTES = 16 << 20


def decode_stream(
    index: ray.ObjectRef,
    row_lists: Iterable[np.ndarray],
    *,
    min_duration_s: float,
    max_duration_s: float,
    storage_timeout_s: float = 300.0,
    decode_cpus: int,
    reserved: bool = False,
    per_execution: int = _PER_EXECUTION,
    cache: ray.ObjectRef | None = None,
    known: Callable[[], Sequence[BadSample]] = tuple,
) -> Iterator[MicroBatch]:
    """Yields the decoded micro-batch of each array of index rows, in order.

    Args:
        index: The `Index` in the object store; tasks read it in place.
        row_lists: Row numbers of each micro-batch; consumed as the stream goes on.
        decode_cpus: Tasks of an execution that run at a time, one CPU each.
        reserved: The caller has reserved these CPUs.
        per_execution: Micro-batches a Ray Data execution runs.
        cache: The `FeatureCache` in the object store, to read from it instead of decoding.
        known: Returns the samples that are known to be bad by now, which are not tried.
    """
    arguments = {
        "indexes": [index],
        "cache": cache,
        "min_duration_s": min_duration_s,
        "max_duration_s": max_duration_s,
        "storage_timeout_s": storage_timeout_s,
    }
    rows_left = iter(row_lists)
    running: deque[Iterator[MicroBatch]] = deque()
    while chunk := list(itertools.islice(rows_left, per_execution)):
        # Drained as fast as it decodes: an execution that must wait for its reader spins, and the training step,
        # in the same process, pays for it. The next one starts while this one is read.
        execution = _execute(chunk, {**arguments, "known": known()}, decode_cpus=decode_cpus, reserved=reserved)
        running.append(prefetch(execution, depth=len(chunk)))
        if len(running) == 2:
            yield from running.popleft()
    while running:
        yield from running.popleft()


def _execute(
    chunk: list[np.ndarray], arguments: dict[str, Any], *, decode_cpus: int, reserved: bool
) -> Iterator[MicroBatch]:
    """Runs one Ray Data execution over the micro-batches of `chunk`."""
    numbers = [range(n, min(n + _PER_TASK, len(chunk))) for n in range(0, len(chunk), _PER_TASK)]
    blocks = stream_blocks(
        [pa.table({"dataset": [0] * len(task), "number": task}) for task in numbers],
        decode_micro_batches,
        {"plans": ray.put([chunk]), **arguments},
        decode_cpus=decode_cpus,
        preserve_order=True,
        reserved=reserved,
        block_bytes=_BLOCK_BYTES,
        prefetch_batches=4,
    )
    for block in blocks:
        for row in range(block.num_rows):
            yield MicroBatch.from_row(block, row)


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Starts to compute `items` in a thread, up to `depth` ahead, and returns them; their errors are raised there.

    The thread is a daemon. A process would wait at its end for one of `concurrent.futures`, and so for data that Ray
    may never deliver.
    """
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
            # With a timeout, so that the thread ends when its consumer is gone instead of holding decoded audio for
            # ever.
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
    known: Callable[[], Sequence[BadSample]],
    change: Callable[[Sequence[Rows]], Sequence[Rows]],
    rank: int,
    world_size: int,
) -> Iterator[tuple[PlannedStep, list[Batch]]]:
    """Yields the steps to come with this rank's micro-batches, prepared ahead in a thread.

    Args:
        cache: The `FeatureCache` in the object store, if the run has one.
        known: Returns the samples that are known to be bad by now, which are not tried.
        change: Returns the micro-batches that are really run for the planned ones of a step; the same on every rank.
    """
    # Here, not at the top: these import torch, which processes that only decode do not need.
    from mowe_ray.training.collate import collate
    from mowe_ray.training.sampler import with_batches

    def load(rows: Iterator[Rows]) -> Iterator[Batch]:
        decoded = _decoded(index, rows, config, cache, known)
        longest = config.data.max_text_tokens
        collated = (collate(micro_batch, processor, max_text_tokens=longest) for micro_batch in decoded)
        return prefetch(collated, _COLLATED_AHEAD)

    return with_batches(sampler, load, change=change, rank=rank, world_size=world_size)


def validation_batches(
    index: ray.ObjectRef,
    config: RunConfig,
    *,
    cache: ray.ObjectRef | None,
    known: Callable[[], Sequence[BadSample]],
    rank: int,
    world_size: int,
) -> Iterator[MicroBatch]:
    """Yields this rank's micro-batches of a validation source, equally many on every rank; as `training_batches`."""
    from mowe_ray.training.sampler import rows_of_rank

    # One micro-batch a step, distributed over the ranks: the clips of a micro-batch, and so its padding, do not depend
    # on the number of ranks.
    plan = [step[0] for step in validation_plan(ray.get(index), config.data)]
    rows = iter(rows_of_rank(plan, rank, world_size))
    return prefetch(_decoded(index, rows, config, cache, known), _COLLATED_AHEAD)


def _decoded(
    index: ray.ObjectRef,
    rows: Iterator[Rows],
    config: RunConfig,
    cache: ray.ObjectRef | None,
    known: Callable[[], Sequence[BadSample]],
) -> Iterator[MicroBatch]:
    # Up to two executions are held at a time, as audio and features.
    encoders = [] if cache is None else ray.get(cache).encoders
    bytes_per_s = _AUDIO_BYTES_PER_S + sum(encoder.bytes_per_s for encoder in encoders)
    ahead = int(config.data.lookahead_gb * 1e9 / (2 * bytes_per_s * config.data.batch_seconds))
    return decode_stream(
        index,
        rows,
        per_execution=max(1, min(_PER_EXECUTION, ahead)),
        min_duration_s=config.data.min_duration_s,
        max_duration_s=config.data.max_duration_s,
        storage_timeout_s=config.data.storage_timeout_s,
        decode_cpus=config.data.decode_cpus,
        reserved=config.compute.reserves_decoding,
        cache=cache,
        known=known,
    )
