"""Rows of all shards of a source: from the machine's cache, from scans kept beside the shards, or by scanning them.

The cache is one memory-mapped Arrow file per source, valid while size and time of every shard stay the same.
"""

import hashlib
import json
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.shards import scan_shard
from mowe_ray.data.shards.completion import WrittenShard, check_scan
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.kept_scans import (
    FOLDER,
    SCAN_VERSION,
    SHARD_FIELD,
    ScanWriter,
    is_store,
    options_key,
    read_scans,
)
from mowe_ray.data.shards.listing import is_folder
from mowe_ray.data.shards.record import ROW_SCHEMA, UNKNOWN_TASK, repeated_id
from mowe_ray.data.shards.storage import is_remote
from mowe_ray.output.run_folder import sync

_CHUNK_ROWS = 1 << 16
_SCHEMA = ROW_SCHEMA.append(SHARD_FIELD)


class ParallelMap(Protocol):
    """Ordered map, like the built-in `map`; implementations may run in parallel or on other machines.

    They may call `function(item, in_child=True)` for an item that ends the process.
    """

    def __call__(self, function: Callable[..., pa.Table], items: Iterable[str], /) -> Iterable[pa.Table]: ...


def map_in_child(function: Callable[..., pa.Table], items: Iterable[str]) -> Iterator[pa.Table]:
    """A `ParallelMap` that nothing in a shard can end: it calls `function` in a child process."""
    with ChildProcess() as child:
        for item in items:
            try:
                yield child.call(function, item)
            except ChildDied:
                yield function(item, in_child=True)


@dataclass(frozen=True)
class ScanRequest:
    """What is scanned, and how.

    Attributes:
        place: Path of the source, and its paths where it has several.
        shards: Paths of its shards; `versions` of each, when they were listed.
        written: What `prepare` wrote to them.
        reading: How its rows are read; the columns and the task decide on a scan.
        allow_paths: What rows may open beside the folder of their shard.
    """

    place: tuple[str, tuple[str, ...]]
    shards: list[str]
    versions: list[str]
    written: dict[str, WrittenShard]
    reading: Reading
    allow_paths: Sequence[str]


def scan_source(request: ScanRequest, cache_dir: Path, index_folder: str | None, run_map: ParallelMap) -> pa.Table:
    """Return the rows of all shards of a source (`record.ROW_SCHEMA` and `shard_number`), memory-mapped.

    Args:
        cache_dir: folder of this machine for the rows.
        index_folder: folder or URL for scans of remote shards that cannot be kept beside them.
        run_map: applies the scan to shards, in order.
    """
    # Of a scan, not of what is made of its rows later: seeds and instructions change nothing in it.
    asked = [request.reading.task, list(request.reading.columns)]
    listed = list(map(list, zip(request.shards, request.versions, strict=True)))
    state = json.dumps([SCAN_VERSION, asked, [*request.allow_paths], listed])
    key = hashlib.sha256(json.dumps([*request.place, asked]).encode()).hexdigest()[:16]
    path = cache_dir / f"index-{key}.arrow"
    if (cached := _open(path)) is not None and (cached.schema.metadata or {}).get(b"state") == state.encode():
        return cached
    table = _in_order([_SCHEMA.empty_table(), *_merged(_scans(request, index_folder, run_map))])
    task = request.reading.task
    if task is not None and pc.any(unnamed := pc.equal(table["task"], UNKNOWN_TASK)).as_py():
        column = table.schema.get_field_index("task")
        table = table.set_column(column, "task", pc.if_else(unnamed, task, table["task"]))
    if repeats := _repeated_ids(table):
        table = pa.concat_tables(_renamed(table, repeats))
    table = table.replace_schema_metadata({"state": state})
    try:
        _write(path, table)
    except OSError as error:
        warnings.warn(
            f"{cache_dir} cannot keep the scan of {request.place[0]}, so later runs scan it again: {error}",
            stacklevel=2,
        )
        return table
    return _open(path) or table


@dataclass(frozen=True)
class _Kept:
    """Where the scans of the shards of one folder are kept: `places` to look at, `writable` of these."""

    folder: str
    options: str
    places: list[str]
    writable: list[str]


def _scans(request: ScanRequest, index_folder: str | None, run_map: ParallelMap) -> Iterator[pa.Table]:
    """Yield the rows of all shards, those first of which a scan was kept."""
    listed = zip(request.shards, request.versions, strict=True)
    wanted = {shard: (number, version) for number, (shard, version) in enumerate(listed)}
    kept = {one.folder: one for one in _kept(request, index_folder)}
    for one in kept.values():
        for place in one.places:
            yield from read_scans(place, one.folder, wanted, one.options, request.written)
    left = dict(wanted)  # in the order of the shards
    scan = partial(scan_shard, reading=Reading(request.reading.columns), allow_paths=request.allow_paths)
    writers = {one.folder: ScanWriter(one.writable, one.folder, one.options) for one in kept.values() if one.writable}
    for shard, rows in zip(left, run_map(scan, list(left)) if left else (), strict=True):
        number, version = left[shard]
        if shard in request.written:
            check_scan(shard, request.written[shard], rows)
        if not is_folder(shard):
            _keep(writers, shard.rpartition("/")[0], shard, version, rows)
        yield rows.append_column(SHARD_FIELD, pa.array(np.full(len(rows), number, np.int32))).cast(_SCHEMA)
    for folder in list(writers):
        _keep(writers, folder)


def _kept(request: ScanRequest, index_folder: str | None) -> Iterator[_Kept]:
    """Yield where the scans of the shards of each folder are, or may be written."""
    by_folder: dict[str, list[str]] = {}
    for shard in request.shards:
        if not is_folder(shard):  # its version is of all that lies in it
            by_folder.setdefault(shard.rpartition("/")[0], []).append(shard)
    for folder, shards in by_folder.items():
        opens_files = any(not (shard.endswith(".tar") or shard in request.written) for shard in shards)
        options = options_key(request.reading.columns, request.allow_paths if opens_files else ())
        places = [f"{folder}/{FOLDER}" if folder else FOLDER] if is_store(folder) or not is_remote(folder) else []
        writable = places if is_store(folder) else []  # of local shards, the cache of this machine does
        if index_folder is not None and is_remote(folder):
            place = f"{index_folder}/{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
            places, writable = [*places, place], [*writable, place]
        yield _Kept(folder, options, places, writable)


def _keep(writers: dict[str, ScanWriter], folder: str, *scanned: Any) -> None:
    """Pass a scan of a shard to the writer of its folder, or without one write what that holds."""
    if (writer := writers.get(folder)) is None:
        return
    try:
        if scanned:
            writer.add(*scanned)
        else:
            writer.flush()
    except Exception as error:  # noqa: BLE001 - each file system has errors of its own; the scan itself is there
        del writers[folder]
        warnings.warn(f"the scan of {folder} cannot be kept, so other machines scan it again: {error}", stacklevel=2)


def _in_order(tables: list[pa.Table]) -> pa.Table:
    """Join rows in the order of their shards."""
    tables.sort(key=lambda table: pc.min(table[SHARD_FIELD.name]).as_py() or 0)
    table = pa.concat_tables(tables)
    shards = table[SHARD_FIELD.name].to_numpy()
    if (shards[1:] < shards[:-1]).any():
        table = table.take(pa.array(np.argsort(shards, kind="stable")))
    return table


def _open(path: Path) -> pa.Table | None:
    """Map a table into memory; None if it is not there, or damaged."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException):
        return None


def _write(path: Path, table: pa.Table) -> None:
    """Write under another name and rename: readers never see half a file, and mapped files never change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _merged(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join small tables: taking rows from thousands of chunks would cost milliseconds."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(part.num_rows for part in held) >= _CHUNK_ROWS:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _repeated_ids(table: pa.Table) -> dict[int, int]:
    """Row number -> how many rows before it have the same id.

    Works on 64-bit hashes, eight bytes a row; if two ids ever share one, the later only gets a
    suffix.
    """
    hashes = np.fromiter((hash(i) for chunk in table["id"].chunks for i in chunk.to_pylist()), np.int64, len(table))
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    repeats: dict[int, int] = {}
    for position in same.tolist():
        repeats[int(order[position])] = repeats.get(int(order[position - 1]), 0) + 1
    return repeats


def _renamed(table: pa.Table, repeats: dict[int, int]) -> Iterator[pa.Table]:
    """Give the second, third... row of an id the suffix #2, #3..., so that ids are distinct."""
    row = 0
    for batch in table.to_batches():
        ids = batch["id"].to_pylist()
        for number, sample_id in enumerate(ids):
            if row + number in repeats:
                ids[number] = repeated_id(sample_id, repeats[row + number] + 1)
        row += len(ids)
        yield pa.Table.from_batches([batch]).set_column(0, "id", pa.array(ids, pa.string()))
