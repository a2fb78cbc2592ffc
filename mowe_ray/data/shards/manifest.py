"""Manifests: JSON lines, a JSON list or TSV with a header line; the audio lies in files of its own.

The index keeps the byte range of each entry, so a manifest of any size is never held in memory for
reading.
"""

import json
from collections.abc import Iterator
from typing import Any

from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import BadAudio, BadSample, Sample
from mowe_ray.data.shards.record import (
    UNKNOWN_TASK,
    Place,
    Record,
    Row,
    bad_row,
    bad_sample,
    check_record,
    make_sample,
    parse_record,
)
from mowe_ray.data.shards.storage import open_file, read_ranges, sibling


def scan(manifest: str, default_task: str | None) -> Iterator[Row]:
    """Yield a row for each entry; a declared duration saves opening the audio file."""
    columns = _columns(manifest)
    for number, (at, entry) in enumerate(_entries(manifest)):
        name = f"{manifest.rsplit('/', 1)[-1]}:{number}"
        try:
            record = parse_record(_parse(entry, columns))
            name = record.id or (record.audio if isinstance(record.audio, str) else name)
            check_record(record, record.audio is not None)
            duration = _duration_s(manifest, record)
        except BadAudio as error:
            yield bad_row(name, error)
            continue
        task = record.task or default_task or UNKNOWN_TASK
        yield Row(name, duration, task, meta_at=at, meta_size=len(entry))


def read(places: list[Place]) -> Iterator[Sample | BadSample]:
    """Read manifest entries by byte range, then the audio files they name."""
    columns = {shard: _columns(shard) for shard in {place.shard for place in places}}
    entries = read_ranges([(p.shard, p.meta_at, p.meta_size) for p in places])
    for place, entry in zip(places, entries, strict=True):
        yield _sample(place, entry, columns[place.shard])


def _sample(place: Place, entry: bytes | OSError, columns: list[str] | None) -> Sample | BadSample:
    try:
        if isinstance(entry, OSError):
            raise BadAudio("unreadable", str(entry))
        record = parse_record(_parse(entry, columns))
        audio = read_audio(place.shard, record.audio) if isinstance(record.audio, str) else record.audio
        return make_sample(place, record, audio)
    except BadAudio as error:
        return bad_sample(place, error)


def read_audio(beside: str, name: str) -> bytes:
    """Read the audio file that the manifest or table `beside` names.

    Raises:
        BadAudio: `no_audio` when it is missing, `unreadable` when the file system fails.
    """
    path = sibling(beside, name)
    try:
        with open_file(path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadAudio("no_audio", f"{path} is missing") from error
    except OSError as error:
        raise BadAudio("unreadable", f"{path}: {error}") from error


def _duration_s(manifest: str, record: Record) -> float:
    if record.audio is None:
        return 0.0
    if record.duration_s:
        return record.duration_s
    if isinstance(record.audio, bytes):
        return header_duration_s(record.audio)
    path = sibling(manifest, record.audio)
    try:
        with open_file(path) as file:
            duration = header_duration_s(file) - (record.offset_s or 0.0)
    except FileNotFoundError as error:
        raise BadAudio("no_audio", f"{path} is missing") from error
    except OSError as error:
        raise BadAudio("unreadable", f"{path}: {error}") from error
    if duration <= 0:
        raise BadAudio("zero_length", f"offset {record.offset_s} s is beyond the end")
    return duration


def _columns(manifest: str) -> list[str] | None:
    """Column names of a TSV; None for JSON."""
    if not manifest.lower().endswith(".tsv"):
        return None
    with open_file(manifest) as file:
        return file.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")


def _entries(manifest: str) -> Iterator[tuple[int, bytes]]:
    """Byte offset and bytes of each entry."""
    with open_file(manifest) as file:
        first = file.read(1)
        file.seek(0)
        if first == b"[":  # one JSON list: found entry by entry, then read like lines
            yield from _list_entries(file.read().decode())
            return
        at = 0
        for number, line in enumerate(file):
            header = number == 0 and manifest.lower().endswith(".tsv")
            if line.strip() and not header:
                yield at, line.rstrip(b"\r\n")
            at += len(line)


def _list_entries(text: str) -> Iterator[tuple[int, bytes]]:
    decoder = json.JSONDecoder()
    at, byte_at = 1, 1
    while True:
        start = at
        while text[start : start + 1] in (" ", "\n", "\r", "\t", ","):
            start += 1
        if text[start : start + 1] in ("]", ""):
            return
        _, end = decoder.raw_decode(text, start)
        byte_at += len(text[at:start].encode())
        entry = text[start:end].encode()
        yield byte_at, entry
        at, byte_at = end, byte_at + len(entry)


def _parse(entry: bytes, columns: list[str] | None) -> dict[str, Any]:
    try:
        if columns is not None:
            return dict(zip(columns, entry.decode().split("\t"), strict=False))
        fields = json.loads(entry)
    except ValueError as error:
        raise BadAudio("unreadable", f"manifest entry: {error}") from error
    if not isinstance(fields, dict):
        raise BadAudio("unreadable", "manifest entry is not a JSON object")
    return fields
