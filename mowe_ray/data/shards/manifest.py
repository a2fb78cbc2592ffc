"""Manifests: JSON lines, a JSON list or TSV with a header line; the audio lies in files of its own.

The index keeps the byte range of each entry, so a manifest of any size is never held in memory for
reading.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import BadAudio, BadSample, Sample, bad_audio, is_about_storage
from mowe_ray.data.shards.record import (
    UNKNOWN_TASK,
    Place,
    Record,
    Row,
    bad_row,
    bad_sample,
    broken_shard,
    check_record,
    make_sample,
    parse_record,
)
from mowe_ray.data.shards.storage import file_of_row, open_file, read_ranges


def field_names(manifest: str) -> list[str]:
    """Return the names of the first entry's fields."""
    columns = manifest_columns(manifest)
    return next((list(parse_entry(entry, columns)) for _, entry in manifest_entries(manifest)), [])


def scan(manifest: str, default_task: str | None, allow_paths: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each entry; a declared duration saves opening the audio file.

    Raises:
        ValueError: the manifest is in UTF-16.
    """
    columns = manifest_columns(manifest)
    try:
        for number, (at, entry) in enumerate(manifest_entries(manifest)):
            yield _row(manifest, number, at, entry, columns, default_task, allow_paths)
    except BadAudio as error:  # of the list as a whole: what came before is good
        yield broken_shard(manifest, error.detail)


def _row(
    manifest: str,
    number: int,
    at: int,
    entry: bytes,
    columns: list[str] | None,
    default_task: str | None,
    allow_paths: Sequence[str],
) -> Row:
    name = f"{manifest.rsplit('/', 1)[-1]}:{number}"
    try:
        record = parse_record(parse_entry(entry, columns))
        name = record.id or (record.audio if isinstance(record.audio, str) else name)
        check_record(record, record.audio is not None)
        duration = _duration_s(manifest, record, allow_paths)
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_row(name, bad_audio(error))
    task = record.task or default_task or UNKNOWN_TASK
    return Row(name, duration, task, meta_at=at, meta_size=len(entry))


def read(places: list[Place]) -> Iterator[Sample | BadSample]:
    """Read manifest entries by byte range, then the audio files they name."""
    columns: dict[str, list[str] | OSError | None] = {}
    for shard in {place.shard for place in places}:
        try:
            columns[shard] = manifest_columns(shard)
        except OSError as error:
            if is_about_storage(error):
                raise
            columns[shard] = error
    entries = read_ranges([(p.shard, p.meta_at, p.meta_size) for p in places])
    for place, entry in zip(places, entries, strict=True):
        yield _sample(place, entry, columns[place.shard])


def _sample(place: Place, entry: bytes | OSError, columns: list[str] | OSError | None) -> Sample | BadSample:
    try:
        if isinstance(entry, OSError) or isinstance(columns, OSError):
            raise BadAudio("unreadable", str(entry if isinstance(entry, OSError) else columns))
        record = parse_record(parse_entry(entry, columns))
        audio = record.audio
        if isinstance(audio, str):
            audio = read_audio(place.shard, audio, place.allow_paths)
        return make_sample(place, record, audio)
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_sample(place, bad_audio(error))


def read_audio(beside: str, name: str, allow_paths: Sequence[str]) -> bytes:
    """Read the audio file that a row of the manifest or table `beside` names."""
    with open_file(file_of_row(beside, name, allow_paths)) as file:
        return file.read()


def _duration_s(manifest: str, record: Record, allow_paths: Sequence[str]) -> float:
    if record.audio is None:
        return 0.0
    path = file_of_row(manifest, record.audio, allow_paths) if isinstance(record.audio, str) else ""
    if record.duration_s:
        return record.duration_s
    if isinstance(record.audio, bytes):
        return header_duration_s(record.audio)
    with open_file(path) as file:
        duration = header_duration_s(file) - (record.offset_s or 0.0)
    if duration <= 0:
        raise BadAudio("zero_length", f"offset {record.offset_s} s is beyond the end")
    return duration


def manifest_columns(manifest: str) -> list[str] | None:
    """Return the column names of a TSV; None for JSON."""
    if not manifest.lower().endswith(".tsv"):
        return None
    with open_file(manifest) as file:
        # A name with a wrong byte matches no known column.
        return file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n").split("\t")


def manifest_entries(manifest: str) -> Iterator[tuple[int, bytes]]:
    """Yield byte offset and bytes of each entry.

    Raises:
        ValueError: the manifest is in UTF-16.
        BadAudio: a JSON list ends early; what came before has been yielded.
    """
    with open_file(manifest) as file:
        head = file.read(4096)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * head.count(0) > len(head):
            raise ValueError(f"{manifest} is in UTF-16: convert it, as by `iconv -f UTF-16 -t UTF-8`")
        at = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        is_tsv = manifest.lower().endswith(".tsv")
        file.seek(at)
        if head[at:].lstrip().startswith(b"[") and not is_tsv:
            # One JSON list: split into entries, then read like lines. Wrong bytes cost the entry that has them.
            yield from _list_entries(file.read().decode(errors="surrogateescape"), at)
            return
        for number, line in enumerate(file):
            if line.strip() and not (number == 0 and is_tsv):
                yield at, line.rstrip(b"\r\n")
            at += len(line)


_SEPARATOR = re.compile(r"[,\]]")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _list_entries(text: str, byte_at: int) -> Iterator[tuple[int, bytes]]:
    at = text.index("[") + 1
    byte_at += len(text[:at].encode(errors="surrogateescape"))
    while True:
        start = at
        while text[start : start + 1] in (" ", "\n", "\r", "\t", ","):
            start += 1
        if text[start : start + 1] == "]":
            return
        end = _entry_end(text, start)
        if end is None:
            raise BadAudio("broken_shard", f"the JSON list ends early, at character {start} of {len(text)}")
        byte_at += len(text[at:start].encode(errors="surrogateescape"))
        entry = text[start:end].encode(errors="surrogateescape")
        yield byte_at, entry
        at, byte_at = end, byte_at + len(entry)


def _entry_end(text: str, start: int) -> int | None:
    """Return the end of the list entry at `start`, None if it has none; the entry itself may be wrong."""
    try:
        # The fast way; after an error, brackets are counted, so that one bad entry does not cost those after it.
        return _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        if text[start : start + 1] not in ("[", "{"):
            following = _SEPARATOR.search(text, start)
            return following.start() if following else None
        depth = 0
        for token in _TOKEN.finditer(text, start):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if depth == 0 and token[0] in "]}":
                return token.end()
        return None


_DECODER = json.JSONDecoder()


def parse_entry(entry: bytes, columns: list[str] | None) -> dict[str, Any]:
    """Return the fields of an entry; BadAudio if it has none."""
    try:
        if columns is not None:
            return dict(zip(columns, entry.decode().split("\t"), strict=False))
        fields = json.loads(entry.decode())
    except (ValueError, RecursionError) as error:
        raise BadAudio("unreadable", f"manifest entry: {error}") from error
    if not isinstance(fields, dict):
        raise BadAudio("unreadable", "manifest entry is not a JSON object")
    return fields
