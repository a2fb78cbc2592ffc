"""The indexes of a run's data in the object store; the trials of a study share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import ray

from mowe_ray.config import RunConfig
from mowe_ray.data.data_report import DataReport
from mowe_ray.data.index import Index
from mowe_ray.data.sample import BadSample
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.ray_data.parallel_map import parallel_map
from mowe_ray.training.datasets import index_sources, source_specs

# What the index does not depend on. A key that is not here costs an index for each of its values, and is never wrong.
_OF_NO_MATTER = {"batch_seconds", "max_batch_size", "shuffle_buffer", "group_by_length", "max_text_tokens"}
_OF_NO_MATTER |= {"decode_cpus", "feature_cache", "storage_timeout_s", "lookahead_gb"}


@dataclass(frozen=True)
class PublishedSources:
    """What `index_sources` returns, in the object store: nothing here grows with the number of samples.

    Attributes:
        train: The `Index` of the training data; `validation` by source name.
        report: What scanning the shards found.
        shards: Paths of all shards.
    """

    train: ray.ObjectRef
    validation: dict[str, ray.ObjectRef]
    report: DataReport
    shards: frozenset[str]


SourcesOf = Callable[[RunConfig, Sequence[BadSample]], PublishedSources]
"""From a run and the samples that ended a process in it earlier to its sources."""


def publish(config: RunConfig, known: Sequence[BadSample] = ()) -> PublishedSources:
    """Index all sources of a run; the objects live as long as this process.

    Args:
        config: Names the sources.
        known: As for `check_sources`.

    Raises:
        ValueError: As `index_sources`.
    """
    sources = index_sources(config.data, parallel_map, seed=config.seed, known=known, storage=config.storage)
    shards = {name for index in (sources.train, *sources.validation.values()) for name in index.shard_names}
    validation = {name: _put(index) for name, index in sources.validation.items()}
    return PublishedSources(_put(sources.train), validation, sources.report, frozenset(shards))


def _put(index: Index) -> ray.ObjectRef:
    """Put an index into the object store, with all that every rank would compute, and without its bad samples."""
    stored = replace(index, bad=[])
    _ = stored.runs, stored.shard_digests  # kept with the object
    return ray.put(stored)


class SourceStore:
    """An actor that publishes equal data once."""

    def __init__(self) -> None:
        self._published: dict[str, PublishedSources] = {}

    def get(self, config: RunConfig) -> PublishedSources:
        """Return the sources of a run."""
        data, seed = config.data, config.seed
        # The specifications hold the seed only where a source draws from it.
        key = f"{data.model_dump_json(exclude=_OF_NO_MATTER)} {sorted(source_specs(data, seed).items())}"
        if key not in self._published:
            self._published[key] = publish(config)
        return self._published[key]


def publisher_of_store() -> SourcesOf:
    """Start a `SourceStore`; returns a function that asks it, from any process of the job.

    The store lives as long as the function does in this process.
    """
    # Wherever there is room: inside of a trial, it would belong to what that has reserved.
    store = ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(SourceStore).remote()

    def ask(config: RunConfig, known: Sequence[BadSample]) -> PublishedSources:
        # What a trial knows is left: the store has looked at the samples once, for all of them.
        try:
            published: PublishedSources = ray.get(store.get.remote(config))
        except ray.exceptions.RayTaskError as error:
            raise ValueError(cause_of(error)) from error
        return published

    return ask
