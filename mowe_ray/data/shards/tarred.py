"""Tars of audio alone, whose texts are in a manifest beside them: tarred datasets of NeMo, and Shar of lhotse.

    audio_0.tar, ...            tarred_audio_manifest.json, or sharded_manifests/manifest_0.json, ...
    recording.000000.tar, ...   cuts.000000.jsonl.gz, ...

The formats: https://docs.nvidia.com/nemo-framework/user-guide/latest/nemotoolkit/asr/datasets.html and
https://lhotse.readthedocs.io/en/latest/datasets.html
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import BadAudio, bad_audio
from mowe_ray.data.shards.audio_field import has_audio_suffix
from mowe_ray.data.shards.compressed import plain
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.manifest import manifest_entries
from mowe_ray.data.shards.members import Part, pack_parts, parse_json, read, record_of
from mowe_ray.data.shards.record import Row, bad_row, check_record, row_of
from mowe_ray.data.shards.storage import fingerprint, is_remote, open_file
from mowe_ray.data.shards.tar import members_of
from mowe_ray.data.shards.walked import open_to_walk

__all__ = ["first_entry", "manifest_of", "read", "scan"]

_NEMO = re.compile(r"^audio_+(?:OP_\d+\.\.\d+_CL_)?(\d+)\.tar$")
_SHAR = re.compile(r"^recording\.(\d+)\.tar$")
# NeMo gives the second, third... segment of a file the name of the first with this behind it.
_SEGMENT = re.compile(r"-sub\d+(?=\.[^.]+$)")


class _Entry(NamedTuple):
    name: str
    at: int
    size: int
    shard: int | None


def manifest_of(shard: str, exists: Callable[[str], bool]) -> str | None:
    """Return the manifest with the texts of a tar, by its name; None for a tar that has none.

    Args:
        exists: whether a path is there.
    """
    folder, slash, base = shard.rpartition("/")
    if match := _SHAR.match(base):
        names = [f"cuts.{match[1]}.jsonl.gz", f"cuts.{match[1]}.jsonl"]
    elif match := _NEMO.match(base):
        number = match[1]
        names = [f"sharded_manifests/manifest_{number}.json", f"manifest_{number}.json", "tarred_audio_manifest.json"]
    else:
        return None
    return next((path for name in names if exists(path := f"{folder}{slash}{name}")), None)


def first_entry(manifest: str) -> dict[str, Any]:
    """Return the fields of the first entry; none if there is no entry."""
    return next((parse_json(entry) for _, entry in manifest_entries(manifest)), {})


def scan(shard: str, manifest: str, reading: Reading) -> Iterator[Row]:
    """Yield a row for each entry of the manifest that is about this tar, in the order of the manifest."""
    by_name: dict[str, Part] = {}
    with open_to_walk(plain(shard)) as file:
        for member in members_of(file):
            stem, _, suffix = member.name.rpartition(".")
            if has_audio_suffix(suffix):
                part = Part("audio", member.offset_data, member.size)
                by_name |= {member.name: part, stem: part}
        number = _NEMO.match(shard.rpartition("/")[2])
        for entry in _entries(manifest, "" if is_remote(manifest) else fingerprint(manifest)):
            if number is None or entry.shard in (None, int(number[1])):
                found = by_name.get(entry.name) or by_name.get(_SEGMENT.sub("", entry.name))
                yield _row(file, entry, found, manifest, reading)


@lru_cache(maxsize=4)
def _entries(manifest: str, version: str) -> list[_Entry]:
    """Return what a manifest lists; a whole dataset's is parsed once a process, not once a tar."""
    found = []
    for at, line in manifest_entries(manifest):
        try:
            fields = parse_json(line)
        except BadAudio:
            fields = {}
        name = fields.get("audio_filepath") or fields.get("id") or ""
        shard = fields.get("shard_id")
        found.append(_Entry(str(name), at, len(line), shard if isinstance(shard, int) else None))
    return found


def _row(file: Any, entry: _Entry, part: Part | None, manifest: str, reading: Reading) -> Row:
    name = entry.name or f"{manifest.rpartition('/')[2]}:{entry.at}"
    try:
        if part is None:
            raise BadAudio("no_audio", f"{entry.name} is not in its tar")
        with open_file(plain(manifest)) as texts:
            texts.seek(entry.at)
            record = record_of({"json": texts.read(entry.size)}, 1, reading)
        check_record(record, has_audio=True)
        duration = record.duration_s
        if duration is None:
            file.seek(part.at)
            duration = header_duration_s(file.read(part.size))
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_row(name, bad_audio(error))
    parts = pack_parts([Part("json", entry.at, entry.size, manifest), part])
    return row_of(record, name, duration, reading, clips=1, parts=parts)
