"""What a worker reads: its decoded, collated micro-batches for training and for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ray

from mowe_ray.config import RunConfig
from mowe_ray.data.batch import MicroBatch
from mowe_ray.data.plan import Rows
from mowe_ray.distributed.pipeline import decode_stream, prefetch
from mowe_ray.model import MoweProcessor
from mowe_ray.training.batch import Batch, collate
from mowe_ray.training.data_order import PlannedStep, TrainingOrder
from mowe_ray.training.lanes import rows_of_rank, with_batches
from mowe_ray.training.sources import validation_plan

# Micro-batches collated ahead of the step that needs them.
_COLLATED_AHEAD = 4


def training_batches(
    index: ray.ObjectRef,
    config: RunConfig,
    processor: MoweProcessor,
    order: TrainingOrder,
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

    return with_batches(order, load, change=change, rank=rank, world_size=world_size)


def validation_batches(
    index: ray.ObjectRef, config: RunConfig, *, cache: ray.ObjectRef | None, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of a validation source, equally many on every rank."""
    # One lane, dealt out: who shares a micro-batch, and so its padding, does not depend on the number of ranks.
    plan = [lanes[0] for lanes in validation_plan(ray.get(index), config.data)]
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
