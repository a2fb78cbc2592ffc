"""Parquet and `datasets` Arrow files with an audio column: `{bytes, path}`, plain bytes or a path.

Any row costs its whole row group to read, so row groups should be small: `write_parquet` makes them
about 2 MiB. Third-party files with hundreds of rows a group are read correctly, but shuffled
reading is slow; `mowe_ray.prepare` rewrites them once.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import BadAudio, BadSample, Sample, bad_audio, is_about_storage
from mowe_ray.data.shards.fields import (
    ANSWER_KEYS,
    AUDIO_KEYS,
    CUT_KEYS,
    RATE_KEYS,
    REFERENCES_KEYS,
    TEXT_KEYS,
    TURNS_KEYS,
    Reading,
    names_in,
)
from mowe_ray.data.shards.manifest import read_audio, read_clips
from mowe_ray.data.shards.record import (
    Place,
    Record,
    Row,
    bad_row,
    bad_sample,
    broken_shard,
    check_record,
    make_sample,
    parse_record,
    raise_if_storage,
    row_of,
)
from mowe_ray.data.shards.storage import fingerprint, is_remote, open_file

_CACHE_BYTES = 256 << 20
_PICKLED = "ray.data.arrow_pickled_object"  # an extension type of Ray Data


class _Parquet:
    """Row groups of a Parquet file."""

    def __init__(self, shard: str) -> None:
        self._file = pq.ParquetFile(open_file(shard) if is_remote(shard) else shard)
        refuse_pickles(shard, self._file.schema_arrow)
        self.names: list[str] = self._file.schema_arrow.names
        self.classes = class_names(self._file.schema_arrow)
        self.num_groups: int = self._file.num_row_groups

    def read(self, group: int, columns: list[str]) -> pa.Table:
        return self._file.read_row_group(group, columns=columns)


class _Arrow:
    """Record batches of an Arrow stream or file, memory-mapped when local.

    Reading checks every offset: Arrow itself trusts them, and a wrong one ends the process.
    """

    def __init__(self, shard: str) -> None:
        data = pa.py_buffer(open_file(shard).read()) if is_remote(shard) else pa.memory_map(shard).read_buffer()
        try:
            reader = pa.ipc.open_stream(data)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(data)
            self._batches = [_batch_or_error(reader, i) for i in range(reader.num_record_batches)]
        else:
            self._batches = list(_until_error(reader))
        refuse_pickles(shard, reader.schema)
        self.names: list[str] = reader.schema.names
        self.classes = class_names(reader.schema)
        self.num_groups = len(self._batches)

    def read(self, group: int, columns: list[str]) -> pa.Table:
        batch = self._batches[group]
        if isinstance(batch, pa.ArrowException):
            raise batch
        table = pa.Table.from_batches([batch]).select(columns)
        for column in table.columns:
            # Text is checked row by row, by `check_record`: a wrong character costs one.
            text = pa.types.is_string(column.type)
            for chunk in column.chunks:
                (chunk.view(pa.binary()) if text else chunk).validate(full=True)
        return table


def _batch_or_error(reader: pa.ipc.RecordBatchFileReader, number: int) -> pa.RecordBatch | pa.ArrowException:
    try:
        return reader.get_batch(number)
    except pa.ArrowException as error:
        return _damage(error)


def _until_error(reader: pa.ipc.RecordBatchStreamReader) -> Iterator[pa.RecordBatch | pa.ArrowException]:
    try:
        yield from reader
    except pa.ArrowException as error:
        yield _damage(error)


def _damage(error: pa.ArrowException) -> pa.ArrowException:
    # A damaged length: an allocation that a batch could need does not fail.
    return pa.ArrowInvalid(str(error)) if isinstance(error, MemoryError) else error


def _validate(shard: str) -> None:
    """Read an Arrow file in a child process, before this one does: damaged metadata may end who reads them.

    Raises:
        pa.ArrowInvalid: they do.
    """
    if _is_arrow(shard):
        with ChildProcess() as child:
            try:
                child.call(_read_all, shard)
            except ChildDied as death:
                raise pa.ArrowInvalid(f"damaged, as {death} that read it") from None


def _read_all(shard: str) -> None:
    with suppress(Exception):  # what is only raised is found again by who uses the file, and costs what it concerns
        table = _Arrow(shard)
        for group in range(table.num_groups):
            with suppress(Exception):  # as above, and the other groups are read all the same
                python_rows(table.read(group, table.names).select([n for n in table.names if n in TEXT_KEYS]))


def refuse_pickles(shard: str, schema: pa.Schema) -> None:
    """Refuse a table with columns of pickled Python objects.

    Ray Data registers an extension type that unpickles the values of such a column when they are read, which runs
    code of whoever wrote the file (https://github.com/ray-project/ray/pull/63470).

    Raises:
        ValueError: naming the file and the columns.
    """
    pickled = [field.name for field in schema if _holds_pickles(field)]
    if pickled:
        names = ", ".join(pickled)
        raise ValueError(f"{shard} has pickled Python objects in {names}: write these columns as strings or bytes")


def _holds_pickles(field: pa.Field) -> bool:
    # Where the extension type is not registered, its name stands in the metadata of the field.
    names = {(field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")}
    kind = field.type
    while isinstance(kind, pa.BaseExtensionType) or pa.types.is_dictionary(kind):
        if isinstance(kind, pa.BaseExtensionType):
            names.add(kind.extension_name)
            kind = kind.storage_type
        else:
            kind = kind.value_type
    return _PICKLED in names or any(_holds_pickles(kind.field(i)) for i in range(kind.num_fields))


@lru_cache(maxsize=32)
def _open(shard: str, version: str) -> _Parquet | _Arrow:
    """Open a shard once per process and version: reading a long footer takes milliseconds."""
    return _Arrow(shard) if _is_arrow(shard) else _Parquet(shard)


def _is_arrow(shard: str) -> bool:
    return shard.lower().endswith(".arrow")


def _version(shard: str) -> str:
    # A remote shard is taken as unchanging: asking costs a request for every batch.
    return "" if is_remote(shard) else fingerprint(shard)


def first_entry(shard: str) -> dict[str, Any]:
    """Return the first row; none if there is no row."""
    _validate(shard)
    table = _open(shard, _version(shard))
    for group in range(table.num_groups):
        if rows := python_rows(table.read(group, table.names).slice(0, 1)):
            return name_classes(rows[0], table.classes)
    return {}


def scan(shard: str, reading: Reading, allow_paths: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each table row; without a duration column all audio is read, once.

    Raises ValueError when no column is known as the answer.
    """
    try:
        _validate(shard)
        table = _open(shard, _version(shard))
        answers = (*ANSWER_KEYS, *REFERENCES_KEYS, *TURNS_KEYS)
        found = {*map(str.lower, table.names), *(field for field, _ in reading.columns)}
        if not {*answers, "supervisions"} & found:
            known = f"none of {', '.join(answers)}: name yours under columns, as {{audio: NAME, answer: NAME}}"
            raise ValueError(f"{shard} has the columns {', '.join(table.names)}, but {known}")
        for group in range(table.num_groups):
            yield from _group(shard, table, group, reading, allow_paths)
    except (pa.ArrowException, OSError, UnicodeDecodeError, BadAudio) as error:
        if is_about_storage(error):
            raise
        yield broken_shard(shard, error.detail if isinstance(error, BadAudio) else str(error))


def _kinds(reading: Reading) -> tuple[set[str], set[str]]:
    """Return the names of the columns of text, which every scan reads, and of those that may hold audio."""
    audio = {name for field, column in reading.columns if field == "audio" for name in names_in(column)}
    texts = {*TEXT_KEYS, *CUT_KEYS, *RATE_KEYS, *reading.wanted} - audio
    return texts, {*AUDIO_KEYS, *audio} - texts


def _group(
    shard: str, table: "_Parquet | _Arrow", group: int, reading: Reading, allow_paths: Sequence[str]
) -> Iterator[Row]:
    texts, audio = _kinds(reading)
    try:
        rows = _rows(table, group, _among(texts))
        # Audio is read for the scan only where a row does not declare its length.
        records = [_record(row, reading) for row in rows]
        talks = any(row.get(key) for row in rows for key in TURNS_KEYS)  # of several clips, maybe
        look = talks or any(record is None or record.duration_s is None or record.history for record in records)
        if look:
            rows = _joined(rows, _rows(table, group, _among(audio)))
            records = [_record(row, reading) for row in rows]
            if any(record is not None and record.audio is None for record in records):
                # Text only, if no other column is audio.
                others = _rows(table, group, lambda name: not _among(texts | audio)(name))
                rows = _joined(rows, others)
    except Exception as error:  # Arrow raises all kinds of errors for damaged tables
        if is_about_storage(error):
            raise
        yield broken_shard(f"{shard}:{group}", f"{type(error).__name__}: {error}")
        return
    for number, fields in enumerate(rows):
        yield _row(shard, group, number, fields, look, reading, allow_paths)


def _among(names: set[str]) -> Callable[[str], bool]:
    """Return whether a column has one of these names, perhaps in capital letters."""
    return lambda name: name in names or name.lower() in names


def _record(fields: dict[str, Any], reading: Reading) -> Record | None:
    """Parse a row; None where that raises, which `_row` counts."""
    try:
        return parse_record(fields, reading)
    except Exception as error:  # whatever one row raises costs this row only
        if is_about_storage(error):
            raise
        return None


def _rows(table: _Parquet | _Arrow, group: int, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Return the rows of a group with the columns that are wanted, classes by name."""
    rows = python_rows(table.read(group, [name for name in table.names if wanted(name)]))
    return [name_classes(row, table.classes) for row in rows]


def python_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return rows as dictionaries; bytes that are not UTF-8 become lone surrogates, which `check_record` refuses."""
    try:
        return table.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [{name: _cell(table[name], row) for name in table.column_names} for row in range(len(table))]


def _cell(column: pa.ChunkedArray, row: int) -> Any:
    try:
        return column[row].as_py()
    except UnicodeDecodeError as error:
        text = error.object.decode(errors="surrogateescape")
        return [text] if pa.types.is_list(column.type) else text  # a list of references is one still


def _joined(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, **other} for row, other in zip(rows, others, strict=True)]


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes of each `ClassLabel` column, or list of them: cells hold only positions.

    Raises:
        BadAudio: the metadata, without which a position means nothing, are damaged.
    """
    stored = (schema.metadata or {}).get(b"huggingface")
    try:
        features = (json.loads(stored).get("info") or {}).get("features") if stored else None
        return {
            column: names for column, feature in (features or {}).items() if (names := _names_of(feature)) is not None
        }
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise BadAudio("broken_shard", f"its metadata of `datasets` are damaged: {error}") from error


def _names_of(feature: Any) -> list[str] | None:
    while isinstance(feature, list) and feature:  # how older versions of `datasets` write a list
        feature = feature[0]
    while isinstance(feature, Mapping) and isinstance(feature.get("feature"), Mapping):
        feature = feature["feature"]
    is_label = isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
    return list(feature.get("names") or []) if is_label else None


def name_classes(row: dict[str, Any], classes: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return a row with class names instead of positions; a position that has no name (-1, null) becomes None."""
    return {**row, **{column: _class_name(row[column], names) for column, names in classes.items() if column in row}}


def _class_name(position: Any, names: list[str]) -> Any:
    if isinstance(position, list):
        return [_class_name(item, names) for item in position]
    if isinstance(position, str):  # the metadata are of an earlier state of the column
        return position
    return names[position] if isinstance(position, int) and 0 <= position < len(names) else None


def _row(
    shard: str,
    group: int,
    number: int,
    fields: dict[str, Any],
    seen: bool,
    reading: Reading,
    allow_paths: Sequence[str],
) -> Row:
    stem = shard.rsplit("/", 1)[-1].rpartition(".")[0]
    sample_id = f"{stem}:{group}:{number}"
    try:
        record = parse_record(fields, reading, None if seen else 1)
        sample_id = record.id or sample_id
        # A declared duration is taken as the promise of audio; reading checks it.
        check_record(record, record.audio is not None or not seen)
        duration = record.duration_s or 0.0
        if record.audio is not None and not duration:
            duration = sum(header_duration_s(read_audio(shard, clip, allow_paths)) for clip in record.clips)
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_row(sample_id, bad_audio(error))
    clips = len(record.clips) if seen else 1
    return row_of(record, sample_id, duration, reading, clips=clips, audio_at=group, meta_at=number)


class _GroupCache:
    """Least recently used row groups of this process, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._groups: OrderedDict[tuple[str, str, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, shard: str, group: int, reading: Reading) -> pa.Table:
        version = _version(shard)
        key = (shard, version, group, reading.wanted)
        with self._lock:  # also keeps two threads from reading through one file object
            if key not in self._groups:
                table = _open(shard, version)
                known = list(filter(_among(set().union(*_kinds(reading))), table.names))
                self._groups[key] = table.read(group, known)
                self._bytes += self._groups[key].nbytes
            self._groups.move_to_end(key)
            # The newest group stays, however large it is: the row that is asked for lies in it.
            while self._bytes > self._max_bytes and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
            return self._groups[key]


_CACHE = _GroupCache(_CACHE_BYTES)


def read(places: list[Place]) -> Iterator[Sample | BadSample]:
    """Read table rows through the row-group cache."""
    return map(_sample, places)


def _sample(place: Place) -> Sample | BadSample:
    try:
        try:
            group = _CACHE.get(place.shard, place.audio_at, place.reading)
            classes = _open(place.shard, _version(place.shard)).classes
        except (pa.ArrowException, OSError) as error:
            raise_if_storage(place.shard, error)
            raise BadAudio("unreadable", f"{place.shard}: {error}") from error
        row = name_classes(python_rows(group.slice(place.meta_at, 1))[0], classes)
        record = parse_record(row, place.reading)
        return make_sample(place, record, read_clips(place.shard, record, place.allow_paths))
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_sample(place, bad_audio(error))
