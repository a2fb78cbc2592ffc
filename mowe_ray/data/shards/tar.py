"""WebDataset tar: members of a sample share a key: `KEY.flac` (wav, mp3, opus...) and `KEY.json`, `.txt` or `.cls`.

A JSON alone is text only. A NeMo or Shar tar has the texts of its clips in a manifest beside it.
Scanning walks member headers and seeks over the audio. Reading takes byte ranges, so any order is
cheap.
"""

import os
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from mowe_ray.data.audio_headers import suffix_of
from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import AUDIO_SUFFIXES, BadAudio, bad_audio, is_about_storage
from mowe_ray.data.shards.audio_field import has_audio_suffix
from mowe_ray.data.shards.compressed import plain
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.members import ANSWER_SUFFIXES, Part, pack_parts, parse_json, read, record_of
from mowe_ray.data.shards.record import Row, bad_row, broken_shard, check_record, row_of
from mowe_ray.data.shards.storage import open_file
from mowe_ray.data.shards.walked import open_to_walk

__all__ = ["members_of", "read", "scan"]

_BLOCK = 512
# Members beside a JSON that are no clip: transcripts, labels and notes.
_TEXT_SUFFIXES = frozenset(
    (
        *(*ANSWER_SUFFIXES, "id", "csv", "tsv", "xml", "yaml", "yml", "md", "html", "srt", "vtt"),
        *("lrc", "ctm", "stm", "trans", "textgrid", "phn", "wrd", "lang", "src", "tgt"),
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
    def answer(self) -> tarfile.TarInfo | None:
        """The member with the answer, where it is in no JSON."""
        named = {member.name.rpartition(".")[2].lower(): member for member in reversed(self.others)}
        return next((named[suffix] for suffix in ANSWER_SUFFIXES if suffix in named), None)

    @property
    def complete(self) -> bool:
        """Whether there is audio and its JSON."""
        return bool(self.audio) and self.meta is not None

    @property
    def usable(self) -> bool:
        """Whether there is audio and its text, in a JSON or not."""
        return bool(self.audio) and (self.meta is not None or self.answer is not None)

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


def first_entry(shard: str) -> dict[str, object]:
    """Return the fields of the first JSON; without any, the first members by suffix."""
    members: dict[str, object] = {}
    with open_file(plain(shard)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if not member.isreg() or _is_hidden(member.name):
                continue
            if member.name.lower().endswith(".json"):
                return parse_json(_content(archive, member))
            if len(members) < 8:
                members.setdefault(f".{_key_of(member.name)[1]}", member.name)
    return members


def scan(shard: str, reading: Reading, allow_paths: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each sample of a tar; samples before a cut, and beside a damaged header, are good.

    A tar opens nothing beside itself, whatever `allow_paths`.

    The members of a sample are joined wherever they lie. Rows come as soon as all before them are complete.
    """
    with open_to_walk(plain(shard)) as file:
        start = _next_header(file, 0)
        if start is None:
            file.seek(0)
            packed = ", but gzip: let its name end with .gz" if file.read(2) == b"\x1f\x8b" else ""
            yield broken_shard(shard, f"no header of a tar in it{packed}")
            return
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            waiting: deque[_Group] = deque()
            damage = [f"damaged up to byte {start}"] if start else []
            for done in _groups(_members(archive, file, start), waiting, damage):
                yield from _row(done, archive, reading)
            groups = _joined(waiting)
            apart = {_short_key(group.key): group for group in groups if group.audio and group.meta is None}
            for group in groups:
                # What a sample lacks may lie in a damaged part: only a whole one is good.
                if group.usable or not damage:
                    yield from _row(group, archive, reading, apart.get(_short_key(group.key)))
            yield from (broken_shard(shard, part) for part in damage)


def members_of(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar up to its end or to where it is damaged."""
    start = _next_header(file, 0)
    if start is None:
        return
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in _members(archive, file, start):
                if not isinstance(member, str) and not _is_hidden(member.name):
                    yield member
    except _Cut:
        return


def _groups(members: Iterator[tarfile.TarInfo | str], waiting: deque[_Group], damage: list[str]) -> Iterator[_Group]:
    """Yield the groups that are complete before any other; `waiting` keeps the rest, `damage` what was damaged."""
    by_key: dict[str, _Group] = {}
    last = ""
    try:
        for member in members:
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
                    yield done
            if key not in by_key or by_key[key].has(member, suffix):
                by_key[key] = _Group(key)
                waiting.append(by_key[key])
                if suffix == "json":
                    _absorb(by_key[key], waiting, by_key)
            by_key[key].add(member, suffix)
            last = key
    except _Cut as cut:
        damage.append(str(cut))


def _absorb(group: _Group, waiting: deque[_Group], by_key: dict[str, _Group]) -> None:
    """Take the clips `KEY.0.flac`, `KEY.1.flac` that lie just before the JSON of `KEY`."""
    waiting.pop()
    while waiting and not waiting[-1].usable and waiting[-1].key.startswith(f"{group.key}."):
        part = waiting.pop()
        del by_key[part.key]
        group.audio, group.others = part.audio + group.audio, part.others + group.others
    waiting.append(group)


def _joined(waiting: Sequence[_Group]) -> list[_Group]:
    """Return groups in which clips `KEY.0.flac`, `KEY.1.flac` are with the text of `KEY`."""
    texts = {group.key: group for group in waiting if not group.audio}
    joined = []
    for group in waiting:
        holder = _text_of(group.key, texts) if group.audio and group.meta is None and group.answer is None else None
        if holder is None:
            joined.append(group)
        else:
            holder.audio += group.audio
    return joined


def _text_of(key: str, texts: dict[str, _Group]) -> _Group | None:
    folder, slash, base = key.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        if (found := texts.get(f"{folder}{slash}{base}")) is not None:
            return found
    return None


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


def _row(group: _Group, archive: tarfile.TarFile, reading: Reading, apart: _Group | None = None) -> Iterator[Row]:
    """Yield the row of a group, if it is a sample.

    Args:
        apart: a group of audio alone that may belong to this one.
    """
    try:
        clips = _clips_of(group, archive)
        texts = {"json": group.meta} if group.meta is not None else {}
        if group.answer is not None and clips:
            texts[group.answer.name.rpartition(".")[2].lower()] = group.answer
        if not clips and not texts:
            return  # members of other kinds (.cls, README)
        record = record_of({name: _content(archive, member) for name, member in texts.items()}, len(clips), reading)
        if not clips and apart is not None and apart is not group:
            raise BadAudio("unknown_audio", f"{apart.audio[0].name} has another key than its JSON")
        clips = _in_order(clips, record.clips)
        check_record(record, bool(clips))
        duration = 0.0
        if clips:
            duration = record.duration_s or sum(_length_s(archive, clip) for clip in clips)
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        yield bad_row(group.key, bad_audio(error))
        return
    yield row_of(record, group.key, duration, reading, clips=len(clips), **_places(texts, clips))


def _places(texts: dict[str, tarfile.TarInfo], clips: list[tarfile.TarInfo]) -> dict[str, int | str]:
    """Return the fields of a row that say where members lie: short ones for a clip and a JSON."""
    if len(clips) < 2 and texts.keys() <= {"json"}:
        places: dict[str, int | str] = {}
        for name, member in (*(("meta", member) for member in texts.values()), *(("audio", clip) for clip in clips)):
            places |= {f"{name}_at": member.offset_data, f"{name}_size": member.size}
        return places
    parts = [Part(name, member.offset_data, member.size) for name, member in texts.items()]
    return {"parts": pack_parts([*parts, *(Part("audio", clip.offset_data, clip.size) for clip in clips)])}


def _in_order(clips: list[tarfile.TarInfo], named: Sequence[object]) -> list[tarfile.TarInfo]:
    """Return clips as the JSON names them; if it does not, as they lie in the tar."""
    by_name = {clip.name.rpartition("/")[2]: clip for clip in clips}
    wanted = [name.rpartition("/")[2] for name in named if isinstance(name, str)]
    return [by_name[name] for name in wanted] if len(clips) > 1 and sorted(wanted) == sorted(by_name) else clips


def _length_s(archive: tarfile.TarFile, clip: tarfile.TarInfo) -> float:
    file = archive.extractfile(clip)
    assert file is not None, "a regular file has content"
    return header_duration_s(file)  # type: ignore[arg-type]


def _clips_of(group: _Group, archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Return the members that are audio, by their suffix or else by their first bytes.

    Raises:
        BadAudio: they may be one clip in several formats, or the only candidate is not audio that is known.
    """
    stems = {member.name.rpartition(".")[0] for member in group.audio}
    if len(stems) < len(group.audio):
        names = ", ".join(member.name for member in group.audio)
        raise BadAudio("unknown_audio", f"several members are audio: {names}")
    if group.audio:
        return group.audio
    for member in group.others:
        suffix = member.name.rpartition(".")[2].lower()
        if suffix in _TEXT_SUFFIXES:
            continue
        if _sniffs(archive, member):
            return [member]
        if group.meta is not None or has_audio_suffix(suffix):
            raise BadAudio("unknown_audio", f"{member.name} is beside the JSON, but is not audio of a known kind")
    return []


def _sniffs(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    file = archive.extractfile(member)
    assert file is not None, "a regular file has content"
    return suffix_of(file.read(_BLOCK)) is not None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "a regular file has content"
    return file.read()
