"""The rows of a source: its shards, scanned once; kept in a memory-mapped Arrow file while they stay the same."""

import hashlib
import json
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.shards import scan_shard
from mowe_ray.data.shards.completion import WrittenShard, check_scan
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.record import ROW_SCHEMA, repeated_id
from mowe_ray.output.run_folder import sync

_VERSION = 6  # raise it when a scan would give other rows, so that old caches are not used
_CHUNK_ROWS = 1 << 16
SHARD_FIELD = pa.field("shard_number", pa.int32())


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


def scan_source(
    place: tuple[str, tuple[str, ...]],
    shards: list[str],
    versions: list[str],
    written: dict[str, WrittenShard],
    reading: Reading,
    cache_dir: Path,
    allow_paths: Sequence[str],
    run_map: ParallelMap,
) -> pa.Table:
    """Return the rows of all shards of a source, memory-mapped, with the number of their shard.

    Args:
        place: path of the source, and its paths where it has several.
        shards: paths of its shards; `versions` of each, when they were listed.
        written: what `prepare` wrote to them.
        reading: how its rows are read; the columns and the task decide on a scan.
        cache_dir: folder for the scans, shared by runs.
        allow_paths: what rows may open beside the folder of their shard.
        run_map: applies the scan to shards, in order.
    """
    # Of a scan, not of what is made of its rows later: seeds and instructions change nothing in it.
    asked = [reading.task, list(reading.columns)]
    state = json.dumps([_VERSION, asked, [*allow_paths], list(map(list, zip(shards, versions, strict=True)))])
    key = hashlib.sha256(json.dumps([*place, asked]).encode()).hexdigest()[:16]
    path = cache_dir / f"index-{key}.arrow"
    if (cached := _open(path)) is not None and (cached.schema.metadata or {}).get(b"state") == state.encode():
        return cached
    scan = partial(scan_shard, reading=Reading(reading.columns, reading.task), allow_paths=allow_paths)
    scans = _checked(shards, written, run_map(scan, shards))
    schema = ROW_SCHEMA.append(SHARD_FIELD).with_metadata({"state": state})
    table = pa.concat_tables(_merged(_numbered(scans, schema)))
    if repeats := _repeated_ids(table):
        table = pa.concat_tables(_renamed(table, repeats))
    try:
        _write(path, table)
    except OSError as error:
        warnings.warn(
            f"{cache_dir} cannot keep the scan of {place[0]}, so later runs scan it again: {error}", stacklevel=2
        )
        return table
    return _open(path) or table


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


def _checked(shards: list[str], written: dict[str, WrittenShard], scans: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Pass on the scans of shards that hold what was written to them."""
    for shard, rows in zip(shards, scans, strict=True):
        if shard in written:
            check_scan(shard, written[shard], rows)
        yield rows


def _numbered(scans: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    for number, rows in enumerate(scans):
        numbers = pa.array(np.full(rows.num_rows, number, np.int32))
        yield rows.append_column(SHARD_FIELD, numbers).cast(schema)


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
