"""Scans of shards, kept beside them: the next machine reads a few objects instead of every shard.

    FOLDER/_index/VERSION-OPTIONS-ID.pq    Parquet, zstd, about 64 MB: rows (`record.ROW_SCHEMA`) of shards in FOLDER

Each file names its shards with their versions; it never changes, and says nothing of shards that have changed since.
Neither folder nor suffix is one that readers of shards take for data.
"""

import hashlib
import io
import json
import os
import posixpath
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mowe_ray.data.shards.byte_ranges import read_ranges
from mowe_ray.data.shards.record import ROW_SCHEMA
from mowe_ray.data.shards.storage import file_system, is_remote, whole_file

SCAN_VERSION = 7  # raise it when a scan would give other rows, so that old ones are not used
FOLDER = "_index"
SHARD_FIELD = pa.field("shard_number", pa.int32())
_SCHEMA = ROW_SCHEMA.append(SHARD_FIELD)
_SUFFIX = ".pq"
_HELD_BYTES = 256 << 20  # of rows in memory, which make a file of about 64 MB
_NOTE = b"mowe_ray"
# Where files can be listed and written, and a file written is not a publication, as it is on a hub.
_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "memory"}


def is_store(url: str) -> bool:
    """Whether a URL is of an object store, beside whose shards their scans are kept."""
    return url.partition("://")[0] in _STORES


def options_key(columns: Sequence[tuple[str, str]], allow_paths: Sequence[str]) -> str:
    """Name what the rows of a scan depend on beside their shard."""
    asked = json.dumps([[*columns], [*allow_paths]])
    return hashlib.blake2b(asked.encode(), digest_size=6).hexdigest()


class ScanWriter:
    """Writes scans of shards in `folder` as they come, in a few files.

    Args:
        places: folders for the files; the first that can be written is used.
        options: `options_key` of the scans.
    """

    def __init__(self, places: Sequence[str], folder: str, options: str) -> None:
        self.names: list[str] = []
        self._places, self._folder, self._options = list(places), folder, options
        self._shards: list[tuple[str, str]] = []
        self._rows: list[pa.Table] = []
        self._bytes = 0

    def add(self, shard: str, version: str, rows: pa.Table) -> None:
        """Keep the rows of a shard of this version; raises as `flush`."""
        numbers = pa.array(np.full(len(rows), len(self._shards), np.int32))
        self._shards.append((shard.rpartition("/")[2], version))
        self._rows.append(rows.select(ROW_SCHEMA.names).append_column(SHARD_FIELD, numbers).cast(_SCHEMA))
        self._bytes += rows.nbytes
        if self._bytes > _HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held.

        Raises:
            Exception: what the file system of the last place raises.
        """
        if not self._shards:
            return
        note = json.dumps({"folder": _absolute(self._folder), "shards": self._shards})
        table = pa.concat_tables(self._rows).replace_schema_metadata({_NOTE: note})
        content = io.BytesIO()
        pq.write_table(table, content, compression="zstd", write_page_checksum=True)
        name = f"{SCAN_VERSION}-{self._options}-{uuid.uuid4().hex}{_SUFFIX}"
        self._write(name, content.getvalue())
        self.names.append(name)
        self._shards, self._rows, self._bytes = [], [], 0

    def _write(self, name: str, content: bytes) -> None:
        while True:
            try:
                with whole_file(f"{self._places[0]}/{name}") as file:
                    file.write(content)
                return
            except Exception:  # each file system has errors of its own; the last place's is raised
                if len(self._places) == 1:
                    raise
                self._places.pop(0)


def read_scans(
    place: str, folder: str, wanted: dict[str, tuple[int, str]], options: str, written: Collection[str]
) -> Iterator[pa.Table]:
    """Yield the rows that files in `place` have of some shards in `folder`, which are taken out of `wanted`.

    Args:
        wanted: number and version by shard; `shard_number` of the rows is that number.
        options: `options_key` of the scans.
        written: shards of which a note says how long they were when they were written. A copy of such a shard has
            another time or ETag, but if it is as long, it is the same.
    """
    for path, size in _files(place, f"{SCAN_VERSION}-{options}-"):
        if not wanted:
            return
        (content,) = read_ranges([(path, 0, size)])
        try:
            table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
            note = json.loads(table.schema.metadata[_NOTE])
        except (TypeError, ValueError, KeyError, OSError):  # damaged, or not there any more: scanned again
            continue
        numbers = np.full(len(note["shards"]), -1, np.int32)
        for local, (name, version) in enumerate(note["shards"]):
            shard = f"{folder}/{name}" if folder else name
            number, current = wanted.get(shard, (-1, ""))
            copied = shard in written and note["folder"] != _absolute(folder) and _size(version) == _size(current)
            if number >= 0 and (version == current or copied):
                numbers[local] = number
                del wanted[shard]
        shards = numbers[table[SHARD_FIELD.name].to_numpy()]
        table = table.set_column(table.num_columns - 1, SHARD_FIELD, pa.array(shards))
        yield (table if (shards >= 0).all() else table.filter(pa.array(shards >= 0))).cast(_SCHEMA)


def _absolute(folder: str) -> str:
    return folder if is_remote(folder) else os.path.abspath(folder)  # noqa: PTH100 - links are other places


def _size(version: str) -> str:
    return version.partition("-")[0]


def _files(place: str, prefix: str) -> list[tuple[str, int]]:
    """Return the path and size of each file of scans in a folder."""
    fs, inner = file_system(place)
    fs.invalidate_cache(inner)  # what another machine has written since
    try:
        entries: list[dict[str, Any]] = fs.ls(inner, detail=True)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    named = {posixpath.basename(entry["name"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}
    names = sorted(name for name in named if name.startswith(prefix) and name.endswith(_SUFFIX))
    return [(f"{place}/{name}", named[name]) for name in names]
