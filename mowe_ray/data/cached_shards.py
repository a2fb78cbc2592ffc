"""Files of a feature cache: rows with a large cell each, in Arrow, written whole and never changed.

On a file system a file is mapped into memory. Of a URL two objects are kept: `NAME.arrow`, the same file, and
`NAME.rows`, its rows with the place of each large cell instead of the cell; readers get the rows once, and cells by
ranges. Each row is compared with its checksum; files of before there were checksums are taken as they are.
"""

import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mowe_ray.data.micro_batch import MicroBatch, load_in_child, load_micro_batch, read_cell
from mowe_ray.data.shards.byte_ranges import read_ranges
from mowe_ray.data.shards.storage import file_system, is_remote, retried, whole_file
from mowe_ray.output.run_folder import sync

_CHUNK_ROWS = 64  # samples that are decoded, and lie in memory, together
_ABANDONED_S = 3600.0  # a writer adds to its part every few seconds
_ROWS = ".rows"
_AUDIO_SCHEMA = pa.schema(
    [
        ("samples", pa.large_binary()),  # int16; empty for text alone and for bad samples
        ("length", pa.int32()),
        ("scale", pa.float64()),
        ("instruction", pa.string()),
        ("answer", pa.string()),
        ("references", pa.list_(pa.string())),
        ("choices", pa.list_(pa.string())),  # older files lack these, groups, and history
        ("groups", pa.map_(pa.string(), pa.string())),
        ("history", pa.string()),  # JSON, of conversations: the turns before the instruction
        ("cause", pa.string()),
        ("detail", pa.string()),
        ("sample", pa.int32()),  # which of the shard's it is; older files have a row for each
        ("crc32", pa.uint32()),  # of the other columns
    ]
)
_FEATURES_SCHEMA = pa.schema(
    [("row", pa.int32()), ("frames", pa.int32()), ("values", pa.large_binary()), ("crc32", pa.uint32())]
)


def write_audio(
    path: str, rows: pa.Table, min_s: float, max_s: float, *, part: str = "", in_child: bool = False
) -> None:
    """Decode a shard's rows, as `shard_rows` returns them, into a file.

    Args:
        part: is in the name of the file until it is whole.
        in_child: for rows that have ended the process that decoded them.
    """
    load = load_in_child if in_child else load_micro_batch
    with _new_file(path, _AUDIO_SCHEMA, part) as writer:
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows.slice(start, _CHUNK_ROWS)
            table = _audio_table(load(chunk, min_s, max_s), chunk["id"].to_pylist(), start)
            writer.write_table(_with_checksums(table, _AUDIO_SCHEMA))


def _audio_table(batch: MicroBatch, ids: list[str], start: int) -> pa.Table:
    """Return a row for each clip, and for each sample without one; the texts of a sample are in its first."""
    good, bad = {name: i for i, name in enumerate(batch.ids)}, {sample.id: sample for sample in batch.bad}
    counts = [batch.counts[good[name]] if batch.counts and name in good else 1 for name in ids]
    rows = [(number, name, clip) for number, name in enumerate(ids) for clip in range(counts[number])]
    sounds = iter(zip(batch.lengths, batch.scales, strict=True))
    lengths, scales = zip(*(next(sounds) if name in good else (0, None) for _, name, _ in rows), strict=True)
    offsets = np.concatenate([[0], 2 * np.cumsum(lengths)]).astype(np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(batch.audio))]

    def column(values: list[Any]) -> list[Any]:
        return [values[good[name]] if name in good and clip == 0 else None for _, name, clip in rows]

    return pa.table(
        {
            "samples": pa.Array.from_buffers(pa.large_binary(), len(rows), buffers),
            "length": lengths,
            "scale": scales,
            "instruction": column(batch.instructions),
            "answer": column(batch.answers),
            "references": column(batch.references),
            "choices": column(batch.choices),
            "groups": column([list(groups.items()) for groups in batch.groups]),
            "history": column([json.dumps(turns) if turns else None for turns in batch.turns_before]),
            "cause": [bad[name].cause if name in bad else None for _, name, _ in rows],
            "detail": [bad[name].detail if name in bad else None for _, name, _ in rows],
            "sample": [start + number for number, _, _ in rows],
        },
        schema=pa.schema(list(_AUDIO_SCHEMA)[:-1]),
    )


def write_features(
    path: str, batches: Iterable[tuple[list[int], list[npt.NDArray[np.uint16]]]], *, part: str = ""
) -> None:
    """Write an encoder's features of a shard: rows of its audio file, and (L, frames, E) of each."""
    with _new_file(path, _FEATURES_SCHEMA, part) as writer:
        for rows, features in batches:
            sizes = [0, *(values.nbytes for values in features)]
            buffers = [
                None,
                pa.py_buffer(np.cumsum(sizes).astype(np.int64)),
                pa.py_buffer(np.concatenate([values.ravel() for values in features])),
            ]
            cells = pa.Array.from_buffers(pa.large_binary(), len(rows), buffers)
            frames = [values.shape[1] for values in features]
            table = pa.table(
                {"row": rows, "frames": frames, "values": cells}, schema=pa.schema(list(_FEATURES_SCHEMA)[:-1])
            )
            writer.write_table(_with_checksums(table, _FEATURES_SCHEMA))


def _with_checksums(table: pa.Table, schema: pa.Schema) -> pa.Table:
    cells = table[_cells_of(table)]
    sums = [_checksum(table, row, read_cell(cells, row)) for row in range(len(table))]
    return table.append_column(schema.field("crc32"), pa.array(sums, pa.uint32()))


def _cells_of(table: pa.Table) -> str:
    """Return the name of the column with the large cells."""
    return "samples" if "length" in table.column_names else "values"


def _checksum(table: pa.Table, row: int, cell: npt.NDArray[np.uint8]) -> int:
    """Return the CRC-32 of a row, without its own checksum."""
    crc = 0
    schema = _AUDIO_SCHEMA if _cells_of(table) == "samples" else _FEATURES_SCHEMA
    for name in schema.names[:-1]:
        if name == _cells_of(table):
            crc = zlib.crc32(cell.data, crc)
        elif name in table.column_names:
            crc = zlib.crc32(repr(table[name][row].as_py()).encode(), crc)
    return crc


@contextmanager
def _new_file(path: str, schema: pa.Schema, part: str) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Write under a unique name and rename: readers never see half a file, and two writers do not interfere."""
    with ExitStack() as stack:
        remote = is_remote(path)
        folder = Path(stack.enter_context(TemporaryDirectory()) if remote else os.path.dirname(path))  # noqa: PTH120
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{path.rpartition('/')[2]}.{part}{uuid.uuid4().hex}.part"
        try:
            with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, schema) as writer:
                yield writer
            if remote:
                _upload(file, path)
            else:
                sync(file)  # a machine that goes down must not leave the name without the content
                file.replace(path)
        finally:
            file.unlink(missing_ok=True)


def _upload(file: Path, url: str) -> None:
    """Write the objects of a URL; the rows are the last, and say that the others are there."""
    content = pa.memory_map(str(file)).read_buffer()
    table = pa.ipc.open_file(content).read_all()
    name = _cells_of(table)
    at, sizes = [], []
    for chunk in table[name].chunks:
        _, offsets, cells = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        at += (ends[:-1] + (cells.address - content.address if cells is not None else 0)).tolist()
        sizes += np.diff(ends).tolist()
    rows = table.drop_columns(name).append_column("at", pa.array(at, pa.int64()))
    rows = rows.append_column("size", pa.array(sizes, pa.int64()))
    held = pa.BufferOutputStream()
    with pa.ipc.new_file(held, rows.schema) as writer:
        writer.write_table(rows)
    for target, part in ((url, content), (f"{url}{_ROWS}", held.getvalue())):
        with whole_file(target) as out:
            out.write(memoryview(part))


@dataclass(frozen=True)
class CachedShard:
    """The rows of a file: mapped into memory, or of a URL without their large cells."""

    path: str
    table: pa.Table

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(R,) samples of each row of decoded audio."""
        return self.table["length"].to_numpy()  # type: ignore[no-any-return]

    def rows_of(self, sample: int) -> range:
        """Return the rows of decoded audio of a sample: one for each of its clips, and one if it has none."""
        first, end = np.searchsorted(self._samples, [sample, sample + 1]).tolist()
        return range(first, max(end, first + 1))

    @cached_property
    def _samples(self) -> npt.NDArray[np.int32]:
        """(R,) the sample of each row of decoded audio; raises as `read_cells`."""
        if "sample" not in self.table.column_names:
            return np.arange(len(self.table), dtype=np.int32)
        samples: npt.NDArray[np.int32] = self.table["sample"].to_numpy()
        if not np.isin(np.diff(samples, prepend=np.int32(-1)), (0, 1)).all():
            raise _removed(self.path, "does not match its checksums")
        return samples

    @cached_property
    def place(self) -> npt.NDArray[np.int32]:
        """Where in a file of features a row of the audio file is."""
        rows = self.table["row"].to_numpy()
        place = np.zeros(int(rows.max(initial=-1)) + 1, np.int32)
        place[rows] = np.arange(len(rows))
        return place

    def waves(self, rows: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """Return (S,) samples in -1..1 of each of some rows; raises as `read_cells`."""
        cells = read_cells([(self, row) for row in rows])
        scales = self.table["scale"].take(pa.array(rows)).to_pylist()
        return [cell.view(np.int16) * np.float32(scale) for cell, scale in zip(cells, scales, strict=True)]


def read_cells(wanted: Sequence[tuple[CachedShard, int]]) -> list[npt.NDArray[np.uint8]]:
    """Return the large cells of rows; those of URLs are read in concurrent requests.

    Raises:
        ValueError: a row is not what was written; its file is removed, so that it can be computed again.
    """
    remote = [
        (file.path, file.table["at"][row].as_py(), size)
        for file, row in wanted
        if is_remote(file.path) and (size := file.table["size"][row].as_py())
    ]
    contents = iter(list(read_ranges(remote)))
    cells = []
    for file, row in wanted:
        try:
            if not is_remote(file.path):
                cell = read_cell(file.table[_cells_of(file.table)], row)
            else:
                content = next(contents) if file.table["size"][row].as_py() else b""
                cell = np.frombuffer(content if isinstance(content, bytes) else b"", np.uint8)
            known = file.table["crc32"][row].as_py() if "crc32" in file.table.column_names else None
            whole = known is None or _checksum(file.table, row, cell) == known
        except (ValueError, IndexError, pa.ArrowException):  # not even text any more, or outside of the file
            whole = False
        if not whole:
            raise _removed(file.path, "does not match its checksums")
        cells.append(cell)
    return cells


def _removed(path: str, damage: str) -> ValueError:
    fs, inner = file_system(path)
    for object_ in (f"{inner}{_ROWS}", inner):
        with suppress(Exception):  # each file system has errors of its own
            fs.rm(object_)
    return ValueError(f"data.feature_cache: {path} {damage} and was removed; run the same command again to compute it")


def whole_names(folder: str) -> set[str]:
    """Return the names of the files in a folder of the cache that are there whole, by one listing."""
    if not is_remote(folder):
        try:
            return {name for name in os.listdir(folder) if name.endswith(".arrow")}  # noqa: PTH208 - 100,000 of them
        except FileNotFoundError:
            return set()
    fs, inner = file_system(folder)

    def names() -> list[str]:
        fs.invalidate_cache(inner)
        return list(fs.ls(inner, detail=False))

    try:
        listed = {path.rpartition("/")[2] for path in retried(folder, names)}
    except FileNotFoundError:
        return set()
    return {name.removesuffix(_ROWS) for name in listed if name.endswith(_ROWS)}


def is_complete(path: str) -> bool:
    """Whether `path` is there and complete."""
    try:
        _open(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _open(path: str) -> pa.Table:
    if not is_remote(path):
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    fs, inner = file_system(f"{path}{_ROWS}")
    return pa.ipc.open_file(retried(path, lambda: fs.cat_file(inner))).read_all()


def open_cached(path: str) -> CachedShard:
    """Map a file into memory, or get the rows of a URL.

    Raises:
        FileNotFoundError: It is not there any more.
    """
    return _open_remote(path) if is_remote(path) else _open_mapped(path)


@lru_cache(maxsize=16_384)  # a process may map 65,530 files
def _open_mapped(path: str) -> CachedShard:
    return CachedShard(path, _reopen(path))


@lru_cache(maxsize=512)  # some 100 kB each
def _open_remote(path: str) -> CachedShard:
    return CachedShard(path, _reopen(path))


def _reopen(path: str) -> pa.Table:
    try:
        return _open(path)
    except FileNotFoundError as error:
        message = f"data.feature_cache: {path} is not there any more; run the same command again to compute it"
        raise FileNotFoundError(message) from error
    except pa.ArrowInvalid as error:
        raise _removed(path, "is cut") from error


def remove_parts(folder: str, part: str = "") -> None:
    """Remove halves of files that writers have left in a cache.

    Args:
        part: of those that had this in their names; by default all that nobody has written to for an hour.
    """
    for file in Path(folder).glob(f"*/*.{part}*.part") if not is_remote(folder) else ():
        with suppress(OSError):  # another run was faster
            if part or time.time() - file.stat().st_mtime > _ABANDONED_S:
                file.unlink()


def prune(folder: str, *, max_bytes: float | None, max_age_s: float | None) -> tuple[int, int]:
    """Remove the files of a cache that were written longest ago; returns how many, and their bytes.

    Args:
        folder: the cache, a path or URL.
        max_bytes: what may be left in all.
        max_age_s: older files go.

    Raises:
        ValueError: nothing is there, or the file system does not say when files were written.
    """
    fs, inner = file_system(folder)
    fs.invalidate_cache()
    found = {path: info for path, info in fs.find(inner, detail=True).items() if _is_of_cache(path, inner)}
    if not found:
        raise ValueError(f"{folder} is no feature cache, or is empty")
    # The two objects of a URL go together, and their place in the order is that of the last.
    written: dict[str, float] = {}
    for path, info in found.items():
        key = path.removesuffix(_ROWS)
        written[key] = max(written.get(key, 0.0), _time_of(path, info))
    left, now, removed, freed = sum(int(info["size"]) for info in found.values()), time.time(), 0, 0
    for key in sorted(written, key=written.__getitem__):
        old = max_age_s is not None and now - written[key] > max_age_s
        if not old and (max_bytes is None or left <= max_bytes):
            break
        for path in [one for one in (f"{key}{_ROWS}", key) if one in found]:
            fs.rm(path)
            left, freed = left - int(found[path]["size"]), freed + int(found[path]["size"])
        removed += 1
    return removed, freed


def _is_of_cache(path: str, folder: str) -> bool:
    below = path[len(folder.rstrip("/")) + 1 :]
    return below.count("/") == 1 and (below.endswith((".arrow", f".arrow{_ROWS}")) or below.endswith(".part"))


def _time_of(path: str, info: dict[str, Any]) -> float:
    changed = next((info[key] for key in ("mtime", "LastModified", "updated", "created") if key in info), None)
    if changed is None:
        raise ValueError(f"{path}: its file system does not say when it was written")
    return float(changed.timestamp() if hasattr(changed, "timestamp") else changed)
