"""Feature extraction: decode the shards of a run and run its frozen encoders on them, into `data.feature_cache`.

Decoding runs in tasks and the encoders in actors, on the resources that the training processes get afterwards. The
results of one run serve all later ones; two runs at the same time process the shards in different orders.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mowe_ray.config import RunConfig
from mowe_ray.data.cached_shards import is_complete, open_cached, remove_parts, write_audio, write_features
from mowe_ray.data.feature_cache import CachedEncoder, FeatureCache, shard_rows
from mowe_ray.data.index import Index
from mowe_ray.data.shards.storage import is_remote, storage_timeout, whole_file
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.ray_data.parallel_map import has_died_twice
from mowe_ray.distributed.ray_data.pipeline import ModelActors, stream_blocks
from mowe_ray.output.terminal import ProgressReporter
from mowe_ray.training.frozen_features import (
    FrozenEncoder,
    describe,
    encode_clips,
    frozen_encoders,
    load_frozen,
    origin_key,
)

T = TypeVar("T")
_LOOK_S = 2.0  # between two looks at the counter


def fill_cache(config: RunConfig, indexes: Iterable[Index], log: Callable[[str], None]) -> FeatureCache:
    """Computes what the cache lacks for a run, and returns the cache.

    Args:
        config: The run, with a `data.feature_cache`.
        indexes: Of its samples.
        log: Called with each line of progress.

    Raises:
        ValueError: The folder cannot be written, or an encoder cannot be loaded.
    """
    assert config.data.feature_cache is not None
    place = config.data.feature_cache.rstrip("/")
    folder = place if is_remote(place) else str(Path(place).absolute())
    remove_parts(folder)
    shards: dict[str, tuple[str, pa.Table]] = {}
    for index in indexes:
        for shard, keyed in shard_rows(index, config.data.min_duration_s, config.data.max_duration_s).items():
            if shards.setdefault(shard, keyed)[0] != keyed[0]:
                raise ValueError(f"data: {shard} changed while it was indexed; run the same command again")
    frozen, notes = frozen_encoders(config.model)
    for line in notes:
        log(line)
    encoders = _described(frozen, config, folder)
    cache = FeatureCache(folder, {shard: key for shard, (key, _) in shards.items()}, encoders)
    missing = cache.missing()
    what = ", ".join(["decoded audio", *(f"features of {encoder.label}" for encoder in encoders)])
    log(f"feature_cache: {what}: {len(shards) - len(missing)} of {len(shards)} shards found in {folder}")
    part = f"{uuid.uuid4().hex[:8]}-"
    wanted = {encoder.key: encoder for lacking in missing.values() for encoder in lacking}
    try:
        if missing:
            rows = [shards[shard][1] for shard in missing]
            labels = ", ".join(encoder.label for encoder in wanted.values())
            # A clip counts once for each encoder; without any, when it is decoded.
            clips = sum(len(shards[shard][1]) * max(1, len(lacking)) for shard, lacking in missing.items())
            label, unit = (f"features of {labels}", "features") if labels else ("decoded audio", "clips")
            counter = _start_counter()
            results = _compute.remote(rows, replace(cache, encoders=list(wanted.values()), part=part), config, counter)
            _follow(results, counter, ProgressReporter(label, clips, unit=unit, log=log))
    except ray.exceptions.RayTaskError as error:
        raise ValueError(f"data.feature_cache: {cause_of(error)}") from error
    finally:
        remove_parts(folder, part)  # of processes that were killed, and of tasks that end now because one has failed
    return cache


def _start_counter() -> Any:
    """Starts an actor on this node that counts what the encoders have done: a shard may take an hour."""

    class Counter:  # by value, as it is local: its process need not import this module, and torch with it
        def __init__(self) -> None:
            self._count = 0

        def add(self, count: int) -> None:
            self._count += count

        def count(self) -> int:
            return self._count

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Counter).remote()


def _follow(results: ray.ObjectRefGenerator, counter: Any, progress: ProgressReporter) -> None:
    """Waits until all shards are done, and reports how many clips are."""
    known = 0
    while True:
        ready, _ = ray.wait([results], timeout=_LOOK_S)
        now = ray.get(counter.count.remote())
        progress.advance(now - known)
        known = now
        try:
            for result in ready:
                ray.get(next(result))
        except StopIteration:
            progress.finish()
            return


@ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")  # not on what a Tune trial has reserved
def _compute(missing: list[pa.Table], cache: FeatureCache, config: RunConfig, counter: Any) -> Iterator[int]:
    """Decodes the shards of these rows, and runs the encoders of `cache` on them; yields numbers of shards done.

    A task of its own, because Ray Data writes much to the terminal of the process that starts it.
    """
    # Not the seeded generator: two runs that fill the same cache would go through it in step, and compute all twice.
    random.SystemRandom().shuffle(missing)
    arguments = {"cache": ray.put(cache), "config": config, "counter": counter}
    blocks = stream_blocks(
        missing,
        _decode,
        arguments,
        decode_cpus=config.compute.max_workers * config.data.decode_cpus,
        preserve_order=False,
        actors=ModelActors(_Encoder, arguments, config.compute) if cache.encoders else None,
    )
    for block in blocks:
        yield block.num_rows


def _decode(rows: pa.Table, cache: ray.ObjectRef, config: RunConfig, counter: Any) -> pa.Table:
    """Decodes a shard, unless the cache has it."""
    shard = rows["cached"][0].as_py()
    known: FeatureCache = ray.get(cache)
    path = known.audio_path(shard)
    if not is_complete(path):
        limits = config.data.min_duration_s, config.data.max_duration_s
        with storage_timeout(config.data.storage_timeout_s):
            write_audio(path, rows, *limits, part=known.part, in_child=has_died_twice())
    if not known.encoders:
        counter.add.remote(len(rows))
    return pa.table({"shard": [shard]})


class _Encoder:
    """Runs the frozen encoders on the clips of shards whose features the cache lacks; one actor of the pipeline."""

    def __init__(self, cache: ray.ObjectRef, config: RunConfig, counter: Any):
        self._cache: FeatureCache = ray.get(cache)
        self._counter = counter
        self._config, self._gpu = config, config.compute.gpus_per_worker > 0
        self._device = torch.device("cuda" if self._gpu else "cpu")
        if not self._gpu:
            torch.set_num_threads(config.compute.cpus_per_worker)
        # Only encoders whose features some shard lacks are loaded.
        wanted = {encoder.encoder_index for encoder in self._cache.encoders}
        self._frozen = {
            encoder.encoder_index: encoder
            for encoder in frozen_encoders(config.model)[0]
            if encoder.encoder_index in wanted
        }
        self._loaded = load_frozen(config.model, list(self._frozen.values()), seed=config.seed, gpu=self._gpu)
        for encoder in self._loaded.values():
            encoder.to(self._device)

    def __call__(self, shards: pa.Table) -> pa.Table:
        """Writes the features of shards."""
        data = self._config.data
        for shard in shards["shard"].to_pylist():
            audio = open_cached(self._cache.audio_path(shard))
            for encoder in self._cache.encoders:
                path = self._cache.features_path(encoder, shard)
                if is_complete(path):
                    continue
                batches = encode_clips(
                    self._loaded[encoder.encoder_index],
                    self._frozen[encoder.encoder_index].features,
                    audio,
                    pad_audio=self._config.model.pad_audio,
                    device=self._device,
                    batch_seconds=data.batch_seconds,
                    max_batch_size=data.max_batch_size,
                )
                write_features(path, self._counted(batches), part=self._cache.part)
        return shards

    def _counted(self, batches: Iterable[tuple[list[int], T]]) -> Iterator[tuple[list[int], T]]:
        for rows, values in batches:
            yield rows, values
            self._counter.add.remote(len(rows))


def _described(frozen: list[FrozenEncoder], config: RunConfig, folder: str) -> list[CachedEncoder]:
    """Returns the keys of the frozen encoders; weights that were hashed before are not loaded again."""
    gpu = config.compute.gpus_per_worker > 0
    notes = [
        f"{folder}/encoders/{origin_key(config.model, encoder, seed=config.seed, gpu=gpu)}.json" for encoder in frozen
    ]
    unknown = [(encoder, note) for encoder, note in zip(frozen, notes, strict=True) if CachedEncoder.read(note) is None]
    if unknown:
        try:
            ray.get(_describe.remote(unknown, config))
        except ray.exceptions.RayTaskError as error:
            raise ValueError(f"data.feature_cache: {cause_of(error)}") from error
    return [known for note in notes if (known := CachedEncoder.read(note)) is not None]


@ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")
def _describe(encoders: list[tuple[FrozenEncoder, str]], config: RunConfig) -> None:
    """Loads encoders and writes a note about each; in a task, because the driver's machine may be small."""
    loaded = load_frozen(
        config.model, [encoder for encoder, _ in encoders], seed=config.seed, gpu=config.compute.gpus_per_worker > 0
    )
    for encoder, note in encoders:
        with whole_file(note) as file:
            file.write(describe(loaded[encoder.encoder_index], encoder, config.model.pad_audio).to_json().encode())
