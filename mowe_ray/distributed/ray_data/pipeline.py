"""Ray Data: decode samples on any CPUs of the cluster, and run models on them, in the planned order.

`stream_blocks` builds and runs every Ray Data pipeline of this package: blocks of work, tasks that decode them, and,
for evaluation and feature extraction, actors that hold a model. `decode_stream` runs it for training: the epoch plan
(`data/epoch_plan.py`) names the rows of every micro-batch, and each rank consumes its own, already in order. Waveforms
travel through the object store as int16 with one scale per clip; features are computed where the model is.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import BadSample
from mowe_ray.data.shards.kept_runs import forget_runs
from mowe_ray.distributed import ray_internals
from mowe_ray.distributed.ray_data.decode_tasks import RunsToKeep, decode_micro_batches
from mowe_ray.distributed.resources import ray_options, worker_bundle
from mowe_ray.training.datasets import validation_plan

if TYPE_CHECKING:
    from mowe_ray.model import MoweProcessor
    from mowe_ray.training.collate import Batch
    from mowe_ray.training.sampler import EpochSampler, PlannedStep

T = TypeVar("T")

_NODE = "ray.io/node-id"  # a label of every node


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
    home: str | None = None,
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
        home: The node on which tasks run that are not reserved, while it has CPUs to spare.
        actors: The second stage; None leaves it out.
        block_bytes: Size from which on a part of a task's output is handed over; None is Ray's 128 MiB.
        prefetch_batches: Blocks that are fetched to this process ahead of their use.
    """
    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    dataset = ray.data.from_blocks(list(blocks)).map_batches(
        decode,
        fn_kwargs=arguments,
        compute=TaskPoolStrategy(size=decode_cpus),
        **_decoding_options(reserved=reserved, home=home),
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


def _decoding_options(*, reserved: bool, home: str | None) -> dict[str, Any]:
    if reserved:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # The worker's own bundle holds these CPUs already; to reserve them again would need twice as many.
        return {"num_cpus": 0, "scheduling_strategy": here}
    anywhere: list[dict[str, Any]] = [{"label_selector": {}}]
    if gpu_nodes := _gpu_nodes():
        anywhere = [{"label_selector": {_NODE: f"!in({','.join(gpu_nodes)})"}}, *anywhere]
    if home is not None:
        anywhere = [{"label_selector": {_NODE: home}}, *anywhere]
    # Each of these where it has a CPU to spare, then the next.
    return {"num_cpus": 1, **anywhere[0], **({"fallback_strategy": anywhere[1:]} if len(anywhere) > 1 else {})}


def _gpu_nodes() -> list[str]:
    """Returns the nodes with GPUs, which decoding leaves alone while others have a CPU to spare.

    Those that join later are not known: those of this run restart its workers, and so its pipelines.
    """
    return sorted(node for node, total in ray_internals.total_resources_per_node().items() if total.get("GPU"))


def home_of(rank: int, *, reserved: bool) -> str:
    """Returns the node that keeps the runs of a rank: its own, or one of those without GPUs, where decoding goes."""
    nodes = ray_internals.total_resources_per_node()
    others = sorted(node for node, total in nodes.items() if total.get("CPU", 0) >= 1 and not total.get("GPU"))
    return others[rank % len(others)] if others and not reserved else str(ray.get_runtime_context().get_node_id())


# Micro-batches a Ray Data execution runs, at most: starting one costs about a second of decoding.
_PER_EXECUTION = 512
AUDIO_BYTES_PER_S = 2 * SAMPLE_RATE
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
    runs: RunsToKeep | None = None,
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
        runs: How remote samples are read together with their neighbours; None reads each alone.
        known: Returns the samples that are known to be bad by now, which are not tried.
    """
    arguments = {
        "indexes": [index],
        "cache": cache,
        "min_duration_s": min_duration_s,
        "max_duration_s": max_duration_s,
        "storage_timeout_s": storage_timeout_s,
        "runs": runs,
    }
    rows_left = iter(row_lists)
    running: deque[Iterator[MicroBatch]] = deque()
    while chunk := list(itertools.islice(rows_left, per_execution)):
        # Drained as fast as it decodes: an execution that must wait for its reader spins, and the training step,
        # in the same process, pays for it. The next one starts while this one is read.
        options: dict[str, Any] = {"decode_cpus": decode_cpus, "reserved": reserved}
        execution = _execute(
            chunk, {**arguments, "known": known()}, home=None if runs is None else runs.home, **options
        )
        running.append(prefetch(execution, depth=len(chunk)))
        if len(running) == 2:
            yield from running.popleft()
    while running:
        yield from running.popleft()
    if runs is not None:
        forget_runs(runs.key)


def _execute(
    chunk: list[np.ndarray], arguments: dict[str, Any], *, decode_cpus: int, reserved: bool, home: str | None
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
        home=home,
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

    lanes = -(-config.micro_batches_per_step // world_size)
    home = home_of(rank, reserved=config.compute.reserves_decoding)
    runs = RunsToKeep.of(sampler.runs, home, f"{config.storage}/{config.name}/{rank}", lanes)

    def load(rows: Iterator[Rows]) -> Iterator[Batch]:
        decoded = _decoded(index, rows, config, cache, known, runs)
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


def per_execution(lookahead_gb: float, batch_seconds: float, features_per_s: float = 0.0) -> int:
    """Returns how many micro-batches an execution runs: two are held at a time, as audio and features.

    Args:
        features_per_s: Bytes of features of a second of audio.
    """
    ahead = int(lookahead_gb * 1e9 / (2 * (AUDIO_BYTES_PER_S + features_per_s) * batch_seconds))
    return max(1, min(_PER_EXECUTION, ahead))


def _decoded(
    index: ray.ObjectRef,
    rows: Iterator[Rows],
    config: RunConfig,
    cache: ray.ObjectRef | None,
    known: Callable[[], Sequence[BadSample]],
    runs: RunsToKeep | None = None,
) -> Iterator[MicroBatch]:
    encoders = [] if cache is None else ray.get(cache).encoders
    features = sum(encoder.bytes_per_s for encoder in encoders)
    return decode_stream(
        index,
        rows,
        per_execution=per_execution(config.data.lookahead_gb, config.data.batch_seconds, features),
        min_duration_s=config.data.min_duration_s,
        max_duration_s=config.data.max_duration_s,
        storage_timeout_s=config.data.storage_timeout_s,
        decode_cpus=config.data.decode_cpus,
        reserved=config.compute.reserves_decoding,
        cache=cache,
        runs=runs,
        known=known,
    )
