"""The datasets of a run: index its sources, report unusable samples, and plan a validation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from mowe_ray.config.data_section import DataSection, EvaluatedData, TrainingSource, ValidationSource
from mowe_ray.data.data_report import DataReport
from mowe_ray.data.epoch_plan import count_samples, plan_epoch
from mowe_ray.data.index import Index, ParallelMap, SourceSpec, build_index
from mowe_ray.data.shards import field_names, list_shards
from mowe_ray.data.shards.audio_field import AUDIO_KEYS
from mowe_ray.data.shards.storage import with_storage_timeout
from mowe_ray.data.synthetic_corpus import builtin_corpus

_BUILTIN = "builtin:"
# Validation samples among which batches of similar length are formed.
_MIXED = 10_000


@dataclass(frozen=True)
class Sources:
    """The samples of a run: the training mixture, each validation source by name, and what was unusable."""

    train: Index
    validation: dict[str, Index]
    report: DataReport


def cache_folder() -> Path:
    """Where scans and the built-in corpus are kept: $XDG_CACHE_HOME/mowe_ray, or ~/.cache/mowe_ray."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mowe_ray"


def index_sources(data: DataSection, run_map: ParallelMap = map) -> Sources:
    """Index all sources of a run, and reject data with too many unusable samples.

    Args:
        run_map: As for `scan_sources`.

    Raises:
        ValueError: A path holds no shards, too much in it is unusable, or nothing in it has audio.
    """
    sources = scan_sources(data, run_map)
    sources.report.check(data.max_bad_fraction)
    check_audio(data, sources)
    if not count_samples(sources.train.sources, [source.weight for source in data.train]):
        paths = ", ".join(source.path for source in data.train)
        raise ValueError(f"data.train: no usable sample in {paths}, or too few for the weight")
    return sources


def scan_sources(data: DataSection, run_map: ParallelMap = map) -> Sources:
    """Find all samples of a run, good and bad; scans are cached, so only new shards cost time.

    Args:
        run_map: Applies the scan to shards, in order; the cluster passes a parallel one.

    Raises:
        ValueError: A path holds no shards.
    """
    train = _build(
        data,
        [_spec(source, f"train{i}:{source.path}", f"data.train.{i}") for i, source in enumerate(data.train)],
        run_map,
    )
    validation = scan_validation(data, run_map)
    return Sources(train, validation, data_report([train, *validation.values()]))


def check_audio(data: DataSection, sources: Sources) -> None:
    """Raise ValueError where no sample of a source has audio, and the configuration does not say so."""
    check_validation_audio(data, sources.validation)
    for number, (source, name) in enumerate(zip(data.train, sources.train.source_names, strict=True)):
        _check_audio(source, f"data.train.{number}", sources.train, name)


def check_validation_audio(data: EvaluatedData, validation: Mapping[str, Index]) -> None:
    """As `check_audio`, for validation sources."""
    for number, source in enumerate(data.validation):
        _check_audio(source, f"data.validation.{number}", validation[source.name], source.name)


def _check_audio(source: TrainingSource | ValidationSource, key: str, index: Index, name: str) -> None:
    samples = index.samples_per_source[name]
    if source.text_only or not samples or index.text_only_per_source[name] < samples:
        return
    shard = next(shard for shard in list_shards(shards_of(source.path)))
    fields = ", ".join(field_names(shard)) or "none that can be read"
    raise ValueError(
        f"{key}.path: none of the {samples} samples of {source.path} has audio; the fields of {shard} are {fields}. "
        f"Audio is read under {', '.join(AUDIO_KEYS[:3])}. If this is meant to be text alone, set {key}.text_only=true"
    )


def scan_validation(data: EvaluatedData, run_map: ParallelMap = map) -> dict[str, Index]:
    """Find the samples of each validation source, by its name; as `scan_sources`."""
    return {
        source.name: _build(data, [_spec(source, source.name, f"data.validation.{i}")], run_map)
        for i, source in enumerate(data.validation)
    }


def data_report(indexes: Iterable[Index]) -> DataReport:
    """Return a report on the usable and unusable samples of these indexes."""
    indexes = list(indexes)
    report = DataReport(
        {name: n for index in indexes for name, n in index.samples_per_source.items()},
        {name: n for index in indexes for name, n in index.text_only_per_source.items()},
    )
    for index in indexes:
        report.add_unindexed(index.bad)
    return report


def _build(data: EvaluatedData, specs: list[SourceSpec], run_map: ParallelMap) -> Index:
    limits = {"min_s": data.min_duration_s, "max_s": data.max_duration_s}

    def patient_map(scan: Callable[..., pa.Table], shards: Iterable[str]) -> Iterable[pa.Table]:
        return run_map(partial(with_storage_timeout, data.storage_timeout_s, scan), shards)

    return build_index(specs, cache_folder(), allow_paths=data.allow_paths, run_map=patient_map, **limits)


def validation_plan(
    index: Index, data: EvaluatedData, *, micro_batches_per_step: int = 1
) -> Iterator[list[np.ndarray]]:
    """Return the steps of one pass over a validation source, the same in every validation."""
    return plan_epoch(
        index.durations,
        index.shards,
        index.sources,
        [1.0],
        seed=0,
        epoch=0,
        lanes=micro_batches_per_step,
        batch_seconds=data.batch_seconds,
        max_batch_size=data.max_batch_size,
        shuffle_buffer=_MIXED,
    )


def _spec(source: TrainingSource | ValidationSource, name: str, key: str) -> SourceSpec:
    return SourceSpec(name, shards_of(source.path), source.task, f"{key}.path")


def shards_of(path: str) -> str:
    """Return where the shards of a configured path are; those of a built-in corpus are written on first use."""
    if not path.startswith(_BUILTIN):
        return path
    folder = cache_folder()
    try:
        return str(builtin_corpus(path.removeprefix(_BUILTIN), folder))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written to {folder}: {error}; XDG_CACHE_HOME names another folder for caches"
        ) from error


def sample_rows(size: int, at_most: int) -> np.ndarray:
    """Return row numbers spread evenly over `size` rows."""
    return np.unique(np.linspace(0, size - 1, min(size, at_most)).astype(np.int64))
