"""The datasets of a run: index its sources, report unusable samples, and plan a validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from mowe_ray.config.data_section import DataSection, EvaluatedData, SourceSection, TrainingSource
from mowe_ray.data.child_process import ChildProcess
from mowe_ray.data.data_report import DataReport
from mowe_ray.data.epoch_plan import EpochPlan, count_samples, plan_epoch
from mowe_ray.data.index import Index, SourceSpec, build_index
from mowe_ray.data.overlap import overlap_warnings
from mowe_ray.data.profile import profiles, warnings_on
from mowe_ray.data.sample import BadSample
from mowe_ray.data.scan import ParallelMap
from mowe_ray.data.shards import first_entry, list_shards
from mowe_ray.data.shards.compressed import cache_folder, plain_name
from mowe_ray.data.shards.fields import ANSWER_KEYS, AUDIO_KEYS, INSTRUCTION_KEYS, Reading
from mowe_ray.data.shards.kept_scans import FOLDER
from mowe_ray.data.shards.record import DEFAULT_INSTRUCTIONS
from mowe_ray.data.shards.storage import storage_timeout, with_storage_timeout
from mowe_ray.data.synthetic_corpus import builtin_corpus

_BUILTIN = "builtin:"
# Validation samples of a lane among which batches of similar length are formed.
_MIXED = 10_000


@dataclass(frozen=True)
class Sources:
    """The samples of a run: the training mixture, each validation source by name, and what was unusable."""

    train: Index
    validation: dict[str, Index]
    report: DataReport


def index_sources(
    data: DataSection,
    run_map: ParallelMap = map,
    *,
    seed: int = 0,
    known: Sequence[BadSample] = (),
    storage: str | None = None,
) -> Sources:
    """Index all sources of a run, and reject data with too many unusable samples.

    Args:
        run_map: As for `scan_sources`.
        seed: As for `scan_sources`.
        storage: As for `scan_sources`.
        known: As for `check_sources`.

    Raises:
        ValueError: A path holds no shards, too much in it is unusable, or nothing in it has audio or is asked.
    """
    sources = scan_sources(data, run_map, seed=seed, storage=storage)
    check_sources(data, sources, known)
    if not count_samples([*sources.train.samples_per_source.values()], [source.weight for source in data.train]):
        paths = ", ".join(source.place for source in data.train)
        raise ValueError(f"data.train: no usable sample in {paths}, or too few for the weight")
    return sources


def scan_sources(
    data: DataSection, run_map: ParallelMap = map, *, seed: int = 0, storage: str | None = None
) -> Sources:
    """Find all samples of a run, good and bad; scans are cached, so only new shards cost time.

    Args:
        run_map: Applies the scan to shards, in order; the cluster passes a parallel one.
        seed: Of what sources draw.
        storage: Folder or URL for scans of remote shards that cannot be kept beside them.

    Raises:
        ValueError: A path holds no shards, or not the columns that are given.
    """
    train = _build(data, [spec for key, spec in source_specs(data, seed).items() if ".train." in key], run_map, storage)
    validation = scan_validation(data, run_map, seed=seed, storage=storage)
    return Sources(train, validation, data_report([train, *validation.values()]))


def check_sources(data: DataSection, sources: Sources, known: Sequence[BadSample] = ()) -> None:
    """Raise ValueError where a source cannot have been meant as it is, and look at a few samples of each.

    The report has what was found.

    Args:
        known: Samples that ended a process earlier, which are not looked at.
    """
    train = {f"data.train.{number}": name for number, name in enumerate(sources.train.source_names)}
    for key, source in zip(train, data.train, strict=True):
        _check_source(key, source, sources.train, train[key])
    check_validation(data, sources.validation)
    sources.report.check(data.max_bad_fraction)
    indexes, limits = [sources.train, *sources.validation.values()], (data.min_duration_s, data.max_duration_s)
    with ChildProcess() as child:  # what is in the files cannot take this process along
        facts = profiles(child, indexes, known, min_s=limits[0], max_s=limits[1])
        overlap = overlap_warnings(child, sources.train, sources.validation)
    keys = {name: key for key, name in train.items()}
    keys |= {name: f"data.validation.{number}" for number, name in enumerate(sources.validation)}
    for name, (found, bad) in facts.items():
        sources.report.set_profile(name, found)
        sources.report.add(bad)
        _check_tried(keys[name], found, bad, max(0.5, data.max_bad_fraction))
    sources.report.check(data.max_bad_fraction)
    own = [source.place for source in data.train if not source.place.startswith(_BUILTIN)]
    builtin = [source.place for source in data.validation if source.place.startswith(_BUILTIN)]
    lines = [*overlap, *warnings_on({name: found for name, (found, _) in facts.items()})]
    if own and builtin:
        lines.append(
            f"data.validation is {builtin[0]}, which says nothing on {own[0]}: give data.validation.0.path, or "
            "data.validation=[]"
        )
    sources.report.warnings += lines


def check_validation(data: EvaluatedData, validation: Mapping[str, Index]) -> None:
    """As `check_sources`, for validation sources by name; opens none of their files."""
    for number, (source, (name, index)) in enumerate(zip(data.validation, validation.items(), strict=True)):
        _check_source(f"data.validation.{number}", source, index, name)


def _check_source(key: str, source: SourceSection, index: Index, name: str) -> None:
    samples = index.samples_per_source[name]
    bad = [sample for sample in index.bad if sample.source == name]
    if not samples and not bad:
        raise ValueError(f"{key}.path: {source.place} holds no samples")
    # Lengths are of all sources, and named by the report of all; what is wrong with rows is of this source.
    of_rows = [sample for sample in bad if sample.cause not in ("too_long", "too_short", "broken_shard")]
    if not samples and of_rows:
        causes = ", ".join(f"{count} {cause}" for cause, count in Counter(s.cause for s in bad).most_common())
        raise ValueError(
            f"{key}.path: no sample of {source.place} can be used: {causes}, such as {of_rows[0].id}: "
            f"{of_rows[0].detail}{_fix_of(of_rows[0], key, source)}"
        )
    if samples and not source.text_only and index.text_only_per_source[name] == samples:
        raise ValueError(
            f"{key}.path: none of the {samples} samples of {source.place} has audio. {_fields_of(key, source)}. "
            f"If this is meant to be text alone, set {key}.text_only=true"
        )
    if not source.instructions and (count := index.asked_nothing[name]):
        usual = ", ".join(DEFAULT_INSTRUCTIONS)
        raise ValueError(
            f"{key}: nothing is asked about {count} of the {samples} samples of {source.place}: they have no "
            f"instruction, and no task with a usual one ({usual}). Set {key}.instruction='...' or {key}.task=asr. "
            f"{_fields_of(key, source)}"
        )


_OF_COLUMNS = ("no_answer", "no_audio", "unknown_audio")


def _fix_of(bad: BadSample, key: str, source: SourceSection) -> str:
    """Return a sentence on what to do about a source of such samples alone, where their cause does not say it."""
    if bad.cause not in _OF_COLUMNS:
        return ""
    lost = bad.cause == "no_audio"
    fix = f"or set {key}.columns, as {{audio: 'clips/{{path}}'}} for those of the column path in the folder clips"
    missing = f" The names of clips start at the folder of their manifest: move it, {fix}." if lost else ""
    return f".{missing} {_fields_of(key, source)}"


def _check_columns(spec: SourceSpec) -> None:
    """Raise ValueError where the first sample of a source lacks a column that the configuration names."""
    try:
        first = list_shards(spec.paths)[0]
    except ValueError:
        return  # a path without shards, which the index says with its key
    entry = first_entry(first)
    lacking = [name for name in spec.reading.wanted if name not in entry]
    if entry and lacking:
        key, fields = str(spec.key).removesuffix(".path"), ", ".join(map(str, entry))
        raise ValueError(f"{key}.columns: {first} has no {', '.join(lacking)}; its fields are {fields}")


def _check_tried(key: str, known: Mapping[str, Any], bad: Sequence[BadSample], most: float) -> None:
    """Raise ValueError where more than this share of the samples that were tried cannot be read, or decoded."""
    for tried, lost, cannot in (("tried", "unreadable", "read"), ("decoded", "undecodable", "decoded")):
        if known.get(lost, 0) > most * known.get(tried, 0):
            raise ValueError(
                f"{key}.path: {known[lost]} of {known[tried]} samples that were tried cannot be {cannot}, such as "
                f"{bad[0].id}: {bad[0].cause}: {bad[0].detail}"
            )


def _fields_of(key: str, source: SourceSection) -> str:
    """Return what the first sample of a source has, and what is read, for messages."""
    shard = next(iter(list_shards(shards_of(source))))
    entry = first_entry(shard)
    fields = ", ".join(map(str, entry)) or "none that can be read"
    example = ", ".join(f"{name}: {str(value)[:40]}" for name, value in entry.items())
    header = ", as its first line names them" if plain_name(shard).lower().endswith((".csv", ".tsv")) else ""
    return (
        f"The fields of {shard} are {fields}" + (f" (first: {example})" if example else "") + f"{header}; read are "
        f"{', '.join(AUDIO_KEYS[:3])}... as audio, {', '.join(ANSWER_KEYS[:3])}... as the answer, "
        f"{', '.join(INSTRUCTION_KEYS[:2])}... as the instruction, and messages or conversations; for others give "
        f"{key}.columns, as {{audio: NAME, answer: NAME}}"
    )


def scan_validation(
    data: EvaluatedData, run_map: ParallelMap = map, *, seed: int = 0, storage: str | None = None
) -> dict[str, Index]:
    """Find the samples of each validation source, by its name; as `scan_sources`."""
    specs = [spec for key, spec in source_specs(data, seed).items() if ".validation." in key]
    return {spec.name: _build(data, [spec], run_map, storage) for spec in specs}


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


def _build(data: EvaluatedData, specs: list[SourceSpec], run_map: ParallelMap, storage: str | None) -> Index:
    for spec in specs:
        if spec.reading.columns:
            _check_columns(spec)

    def patient_map(scan: Callable[..., pa.Table], shards: Iterable[str]) -> Iterable[pa.Table]:
        return run_map(partial(with_storage_timeout, data.storage_timeout_s, scan), shards)

    with storage_timeout(data.storage_timeout_s):
        return build_index(
            specs,
            cache_folder(),
            min_s=data.min_duration_s,
            max_s=data.max_duration_s,
            allow_paths=data.allow_paths,
            run_map=patient_map,
            index_folder=f"{storage.rstrip('/')}/{FOLDER}" if storage else None,
        )


def validation_plan(index: Index, data: EvaluatedData, *, micro_batches_per_step: int = 1) -> EpochPlan:
    """Return the steps of one pass over a validation source, the same in every validation."""
    return plan_epoch(
        index.durations,
        index.runs,
        [1.0],
        seed=0,
        epoch=0,
        lanes=micro_batches_per_step,
        batch_seconds=data.batch_seconds,
        max_batch_size=data.max_batch_size,
        shuffle_buffer=_MIXED,
    )


def source_specs(data: EvaluatedData, seed: int = 0) -> dict[str, SourceSpec]:
    """Return all sources of a run or an evaluation by their keys."""
    train = data.train if isinstance(data, DataSection) else []
    names = [f"train{number}:{source.place}" for number, source in enumerate(train)] + data.validation_names
    keys = [f"data.train.{number}" for number in range(len(train))]
    keys += [f"data.validation.{number}" for number in range(len(data.validation))]
    return {
        f"{key}.path": _spec(source, name, key, seed)
        for key, name, source in zip(keys, names, [*train, *data.validation], strict=True)
    }


def _spec(source: SourceSection, name: str, key: str, seed: int) -> SourceSpec:
    draws = len(source.instructions) > 1 or (source.limit is not None and source.limit < 1)
    reading = Reading(
        columns=tuple(source.columns.items()),
        instructions=source.instructions,
        labels=tuple(source.labels or ()),
        last_turn_only=isinstance(source, TrainingSource) and source.train_on == "last",
        seed=seed if draws else 0,
    )
    return SourceSpec(
        name,
        source.place,
        source.task,
        f"{key}.path",
        reading=reading,
        limit=source.limit,
        max_s=source.max_duration_s,
        paths=tuple(shards_of(source)),
    )


def shards_of(source: SourceSection) -> list[str]:
    """Return where the shards of a source are; those of a built-in corpus are written on first use."""
    return [_written(path) for path in source.paths]


def _written(path: str) -> str:
    if not path.startswith(_BUILTIN):
        return path
    folder = cache_folder()
    try:
        return str(builtin_corpus(path.removeprefix(_BUILTIN), folder))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written to {folder}: {error}; XDG_CACHE_HOME names another folder for caches"
        ) from error
