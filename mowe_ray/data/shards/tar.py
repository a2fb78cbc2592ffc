"""WebDataset tar: `KEY.flac` (wav, mp3, opus...) next to `KEY.json`; a JSON alone is text only.

Scanning walks member headers and seeks over the audio. Reading takes byte ranges, so any order is
cheap.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import AUDIO_SUFFIXES, BadAudio, BadSample, Sample
from mowe_ray.data.shards.record import (
    UNKNOWN_TASK,
    Place,
    Row,
    bad_row,
    bad_sample,
    broken_shard,
    check_record,
    make_sample,
    parse_record,
)
from mowe_ray.data.shards.storage import open_file, read_ranges

_BLOCK = 512


class _Cut(Exception):  # noqa: N818 - not an error: what came before is good
    """The archive ends before its end marker."""


@dataclass(slots=True)
class _Group:
    """The consecutive members that share a key."""

    key: str
    audio: tarfile.TarInfo | None = None
    meta: tarfile.TarInfo | None = None


def scan(shard: str, default_task: str | None) -> Iterator[Row]:
    """Yield a row for each sample of a tar; samples before a cut are good."""
    with open_file(shard) as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closed below
        except tarfile.TarError as error:
            yield broken_shard(shard, str(error))
            return
        with archive:
            group: _Group | None = None
            try:
                for member in _members(archive, file):
                    key, _, suffix = member.name.rpartition(".")
                    if group is None or group.key != key:
                        if group is not None:
                            yield from _row(group, archive, default_task)
                        group = _Group(key)
                    if suffix.lower() == "json":
                        group.meta = member
                    elif suffix.lower() in AUDIO_SUFFIXES:
                        group.audio = member
            except _Cut as cut:
                # Half of the last sample may lie beyond the cut: only a complete one is good.
                if group is not None and group.audio and group.meta:
                    yield from _row(group, archive, default_task)
                yield broken_shard(shard, str(cut))
                return
            if group is not None:
                yield from _row(group, archive, default_task)


def _members(archive: tarfile.TarFile, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of the archive; raise _Cut where it ends without its end marker."""
    size = file.seek(0, os.SEEK_END)
    end = 0
    while True:
        try:
            member = archive.next()
        except tarfile.TarError as error:
            raise _Cut(f"at byte {end} of {size}: {error}") from error
        if member is None:
            break
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if member.offset_data + member.size > size:
            raise _Cut(f"{member.name} ends at byte {end} of {size}")
        if member.isreg():
            yield member
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a missing or damaged header for the end
        raise _Cut(f"no end marker at byte {end} of {size}")


def _row(group: _Group, archive: tarfile.TarFile, default_task: str | None) -> Iterator[Row]:
    audio, meta = group.audio, group.meta
    if audio is None and meta is None:
        return  # members of other kinds (.txt, .cls, README)
    try:
        fields = _parse_json(_content(archive, meta)) if meta is not None else {}
        record = parse_record(fields)
        check_record(record, audio is not None)
        duration = record.duration_s or 0.0
        if audio is not None and not duration:
            member = archive.extractfile(audio)
            assert member is not None, "a regular file has content"
            duration = header_duration_s(member)  # type: ignore[arg-type]
    except BadAudio as error:
        yield bad_row(group.key, error)
        return
    yield Row(
        id=record.id or group.key,
        duration_s=duration if audio is not None else 0.0,
        task=record.task or default_task or UNKNOWN_TASK,
        audio_at=audio.offset_data if audio is not None else 0,
        audio_size=audio.size if audio is not None else 0,
        meta_at=meta.offset_data if meta is not None else 0,
        meta_size=meta.size if meta is not None else 0,
    )


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "a regular file has content"
    return file.read()


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except ValueError as error:  # also UnicodeDecodeError
        raise BadAudio("unreadable", f"JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadAudio("unreadable", "JSON is not an object")
    return fields


def read(places: list[Place]) -> Iterator[Sample | BadSample]:
    """Read samples by byte range."""
    ranges = [
        part
        for place in places
        for part in (
            (place.shard, place.meta_at, place.meta_size),
            (place.shard, place.audio_at, place.audio_size),
        )
    ]
    contents = read_ranges(ranges)
    for place in places:
        yield _sample(place, next(contents), next(contents))


def _sample(place: Place, meta: bytes | OSError, audio: bytes | OSError) -> Sample | BadSample:
    if isinstance(meta, OSError) or isinstance(audio, OSError):
        error = meta if isinstance(meta, OSError) else audio
        return bad_sample(place, BadAudio("unreadable", str(error)))
    if len(meta) < place.meta_size or len(audio) < place.audio_size:
        return bad_sample(place, BadAudio("broken_shard", f"{place.shard} has become shorter"))
    try:
        record = parse_record(_parse_json(meta) if place.meta_size else {})
        return make_sample(place, record, audio if place.audio_size else None)
    except BadAudio as error:
        return bad_sample(place, error)
