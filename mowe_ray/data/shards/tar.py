"""WebDataset tar: `KEY.flac` (wav, mp3, opus...) and `KEY.json`; a JSON alone is text only.

Scanning walks member headers and seeks over the audio. Reading takes byte ranges, so any order is
cheap.
"""

import json
import os
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from mowe_ray.data.audio_headers import suffix_of
from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import AUDIO_SUFFIXES, BadAudio, BadSample, Sample, bad_audio, is_about_storage
from mowe_ray.data.shards.audio_field import has_audio_suffix
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
# Members beside a JSON that are no clip: transcripts, labels and notes.
_TEXT_SUFFIXES = frozenset(
    (
        *("txt", "text", "cls", "lab", "label", "id", "csv", "tsv", "xml", "yaml", "yml", "md", "html", "srt", "vtt"),
        *("lrc", "ctm", "stm", "trn", "trans", "textgrid", "phn", "wrd", "lang", "src", "tgt"),
    )
)


class _Cut(Exception):  # noqa: N818 - not an error: what came before is good
    """The archive ends before its end marker."""


@dataclass(slots=True)
class _Group:
    """The members that share a key."""

    key: str
    audio: list[tarfile.TarInfo] = field(default_factory=list)
    meta: tarfile.TarInfo | None = None
    others: list[tarfile.TarInfo] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether there is audio and its JSON."""
        return bool(self.audio) and self.meta is not None

    def has(self, member: tarfile.TarInfo, suffix: str) -> bool:
        """Whether `member` is there already, so that another one begins a new sample."""
        if suffix == "json":
            return self.meta is not None
        return any(member.name == other.name for other in self.audio)

    def add(self, member: tarfile.TarInfo, suffix: str) -> None:
        """Put a member where it belongs."""
        if suffix == "json":
            self.meta = member
        else:
            (self.audio if suffix in AUDIO_SUFFIXES else self.others).append(member)


def field_names(shard: str) -> list[str]:
    """Return the names of the first JSON's fields."""
    with open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isreg() and member.name.lower().endswith(".json") and not _is_hidden(member.name):
                return list(_parse_json(_content(archive, member)))
    return []


def scan(shard: str, default_task: str | None, allow_paths: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each sample of a tar; samples before a cut, and beside a damaged header, are good.

    A tar opens nothing beside itself, whatever `allow_paths`.

    The members of a sample are joined wherever they lie. Rows come as soon as all before them are complete.
    """
    with open_file(shard) as file:
        start = _next_header(file, 0)
        if start is None:
            yield broken_shard(shard, "no header of a tar in it")
            return
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            waiting: deque[_Group] = deque()
            by_key: dict[str, _Group] = {}
            last = ""
            damage = [f"damaged up to byte {start}"] if start else []
            try:
                for member in _members(archive, file, start):
                    if isinstance(member, str):
                        damage.append(member)
                        continue
                    if _is_hidden(member.name):
                        continue
                    key, suffix = _key_of(member.name)
                    if key != last:
                        while waiting and waiting[0].complete:
                            done = waiting.popleft()
                            if by_key[done.key] is done:
                                del by_key[done.key]
                            yield from _row(done, archive, default_task)
                    if key not in by_key or by_key[key].has(member, suffix):
                        by_key[key] = _Group(key)
                        waiting.append(by_key[key])
                    by_key[key].add(member, suffix)
                    last = key
            except _Cut as cut:
                damage.append(str(cut))
            apart = {_short_key(group.key): group for group in waiting if group.audio and group.meta is None}
            for group in waiting:
                # What a sample lacks may lie in a damaged part: only a complete one is good.
                if group.complete or not damage:
                    yield from _row(group, archive, default_task, apart.get(_short_key(group.key)))
            yield from (broken_shard(shard, part) for part in damage)


def _is_hidden(name: str) -> bool:
    """Whether a member is the file system's own, as macOS adds `._a.wav` to each `a.wav`."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/")) or "__MACOSX/" in name


def _key_of(name: str) -> tuple[str, str]:
    """Return a member's key and its suffix in lower case; `a.wav.json` has the key of `a.wav`."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    key, suffix = f"{folder}{slash}{stem if dot else base}", suffix.lower() if dot else ""
    stem, _, inner = key.rpartition(".")
    return (stem if suffix == "json" and stem and has_audio_suffix(inner) else key), suffix


def _short_key(key: str) -> str:
    """Return a key as webdataset's own tools take it, up to the first dot, without its folder and its case."""
    return key.rpartition("/")[2].partition(".")[0].lower()


def _members(archive: tarfile.TarFile, file: BinaryIO, start: int) -> Iterator[tarfile.TarInfo | str]:
    """Yield the regular files of the archive from its first header on, and a line on each damaged part.

    Raises:
        _Cut: it ends without its end marker.
    """
    size, end = file.seek(0, os.SEEK_END), start
    while True:
        try:
            member = archive.next()
        except Exception as error:  # tarfile raises all kinds of errors for damaged headers
            if is_about_storage(error):
                raise
            member = None
        if member is None or member.size < 0:
            file.seek(end)
            if file.read(_BLOCK) == bytes(_BLOCK):  # the end marker; tarfile takes a damaged header for one, too
                return
            found = _next_header(file, end + _BLOCK)
            if found is None:
                raise _Cut(f"no end marker at byte {end} of {size}")
            yield f"damaged from byte {end} to {found} of {size}"
            archive.offset = end = found
            continue
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        if member.offset_data + member.size > size:
            raise _Cut(f"{member.name} ends at byte {end} of {size}")
        if member.isreg():
            yield member


def _next_header(file: BinaryIO, at: int) -> int | None:
    """Return where the next header is, from `at` on; its checksum tells it from other content."""
    file.seek(at)
    while len(block := file.read(_BLOCK)) == _BLOCK:
        try:
            tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            at += _BLOCK
        else:
            return at
    return None


def _row(
    group: _Group, archive: tarfile.TarFile, default_task: str | None, apart: _Group | None = None
) -> Iterator[Row]:
    """Yield the row of a group, if it is a sample.

    Args:
        apart: a group of audio alone that may belong to this one.
    """
    meta = group.meta
    try:
        audio = _audio_of(group, archive)
        if audio is None and meta is None:
            return  # members of other kinds (.txt, .cls, README)
        fields = _parse_json(_content(archive, meta)) if meta is not None else {}
        record = parse_record(fields)
        if audio is None and apart is not None and apart is not group:
            raise BadAudio("unknown_audio", f"{apart.audio[0].name} has another key than its JSON")
        check_record(record, audio is not None)
        duration = record.duration_s or 0.0
        if audio is not None and not duration:
            member = archive.extractfile(audio)
            assert member is not None, "a regular file has content"
            duration = header_duration_s(member)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        yield bad_row(group.key, bad_audio(error))
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


def _audio_of(group: _Group, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return the one member that is audio, by its suffix or else by its first bytes.

    Raises:
        BadAudio: there are several, or the only candidate is not audio that is known.
    """
    if len(group.audio) == 1:
        return group.audio[0]
    if group.audio:
        names = ", ".join(member.name for member in group.audio)
        raise BadAudio("unknown_audio", f"several members are audio: {names}")
    for member in group.others:
        suffix = member.name.rpartition(".")[2].lower()
        if suffix in _TEXT_SUFFIXES:
            continue
        if _sniffs(archive, member):
            return member
        if group.meta is not None or has_audio_suffix(suffix):
            raise BadAudio("unknown_audio", f"{member.name} is beside the JSON, but is not audio of a known kind")
    return None


def _sniffs(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    file = archive.extractfile(member)
    assert file is not None, "a regular file has content"
    return suffix_of(file.read(_BLOCK)) is not None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "a regular file has content"
    return file.read()


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
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
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_sample(place, bad_audio(error))
