"""The note beside the shards that `mowe_ray.prepare` writes: whether they are all there, and what is in each.

It is written first, as unfinished, and again when all else is there. A folder without one is taken as it is.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mowe_ray.data.shards.storage import file_system, whole_file

NOTE = "prepared.json"


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """What was written to a shard; `ids` is a hash of the samples' ids in their order."""

    samples: int
    bytes: int
    ids: str


def hash_ids(ids: pa.Array | pa.ChunkedArray) -> str:
    """Return a hash of strings in their order, which does not depend on how Arrow holds them."""
    chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
    wide = pa.concat_arrays([pa.array([], pa.large_string()), *(chunk.cast(pa.large_string()) for chunk in chunks)])
    _, offsets, content = wide.buffers()
    ends = np.frombuffer(offsets, np.int64)[wide.offset : wide.offset + len(wide) + 1]
    digest = hashlib.blake2b(np.diff(ends).tobytes(), digest_size=16)
    if len(wide) and content is not None:
        digest.update(memoryview(content)[ends[0] : ends[-1]])
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Note:
    """What the note of a folder says.

    Attributes:
        complete: Whether everything has been written.
        request: What was asked for, as JSON values; who asks for the same may finish it.
        shards: By file name; none before it is complete.
    """

    complete: bool
    request: dict[str, Any]
    shards: dict[str, WrittenShard] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards.values())


def write_note(folder: str, note: Note) -> None:
    """Write the note of a folder."""
    with whole_file(f"{folder}/{NOTE}") as file:
        file.write((json.dumps({**asdict(note), "samples": note.samples}, indent=1) + "\n").encode())


def read_note(folder: str) -> Note | None:
    """Return the note of a folder, None if it has none.

    Raises:
        ValueError: It is damaged.
    """
    fs, inner = file_system(folder or ".")
    try:
        fields = json.loads(fs.cat_file(f"{inner}/{NOTE}"))
        shards = {name: WrittenShard(**shard) for name, shard in fields["shards"].items()}
        return Note(bool(fields["complete"]), fields["request"], shards)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/{NOTE} is damaged: prepare the corpus again, with --overwrite") from error


def check_complete(folder: str, shards: Iterable[str] | None) -> None:
    """Raise ValueError where `prepare` has not finished a folder, or where it lacks one of its shards.

    Args:
        shards: What is there; None if some were left out on purpose.
    """
    note = read_note(folder)
    if note is None:
        return
    if not note.complete:
        raise ValueError(
            f"data path {folder!r} is not complete: mowe_ray.prepare was interrupted while it wrote it. Run the same "
            "command again, which goes on where it was, or prepare it anew with --overwrite"
        )
    missing = [] if shards is None else sorted(note.shards.keys() - {shard.rpartition("/")[2] for shard in shards})
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"data path {folder!r} lacks {', '.join(missing[:3])}{more}, which its {NOTE} names: copy it again; "
            f"to train on a part of it, name the files, as in '{folder}/*.{missing[0].rpartition('.')[2]}'"
        )


def written_shards(shards: Sequence[str]) -> dict[str, WrittenShard]:
    """Return what was written to those of `shards` that the note beside them names."""
    notes = {folder: read_note(folder) for folder in {shard.rpartition("/")[0] for shard in shards}}
    found = {}
    for shard in shards:
        folder, _, name = shard.rpartition("/")
        if (note := notes[folder]) is not None and name in note.shards:
            found[shard] = note.shards[name]
    return found


def check_size(shard: str, written: WrittenShard, size: str) -> None:
    """Raise ValueError where a shard has not the bytes that were written; `size` is "None" where nobody knows."""
    if size not in (str(written.bytes), "None"):
        raise ValueError(f"{shard} has {size} bytes, and not the {written.bytes} that {NOTE} beside it names: {_FIX}")


def check_scan(shard: str, written: WrittenShard, rows: pa.Table) -> None:
    """Raise ValueError where a shard has other samples than were written; damaged ones are counted as bad instead."""
    if rows["cause"].null_count == len(rows) and (len(rows), hash_ids(rows["id"])) != (written.samples, written.ids):
        raise ValueError(f"{shard} does not hold the {written.samples} samples that {NOTE} beside it names: {_FIX}")


_FIX = f"copy it again, or prepare the corpus again; if you have rewritten it yourself, remove {NOTE}"
