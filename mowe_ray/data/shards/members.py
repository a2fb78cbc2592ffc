"""A sample in pieces, each a range of bytes: members of a tar, files of a folder, entries of a manifest beside it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mowe_ray.data.sample import AUDIO_SUFFIXES, BadAudio, BadSample, Sample, bad_audio
from mowe_ray.data.shards.byte_ranges import read_ranges
from mowe_ray.data.shards.compressed import plain
from mowe_ray.data.shards.fields import ANSWER_KEYS, TURNS_KEYS, Reading
from mowe_ray.data.shards.record import Place, Record, bad_sample, make_sample, parse_record

# Members that hold the answer where there is no JSON, or none in it; the first present one wins.
ANSWER_SUFFIXES = ("txt", "text", "transcript", "transcription", "caption", "answer", "lab", "label", "trn", "cls")


INLINE = -1


class Part(NamedTuple):
    """A piece of a sample: what it is by its suffix, where it is, and its file if that is not the shard.

    At `INLINE` it is the text in place of the path.
    """

    suffix: str
    at: int
    size: int
    path: str | None = None


def pack_parts(parts: Sequence[Part]) -> str:
    """Return parts as a column of the index has them."""
    return json.dumps([part[: 3 + (part.path is not None)] for part in parts])


def parts_in_shard(packed: str) -> list[tuple[int, int]]:
    """Return offset and size of those of packed parts that lie in the shard itself."""
    parts = [Part(*part) for part in json.loads(packed)]
    return [(part.at, part.size) for part in parts if part.path is None]


def parts_of(place: Place) -> list[Part]:
    """Return the parts of a place: those it lists, or a JSON and a clip."""
    if place.parts is not None:
        return [Part(*part) for part in json.loads(place.parts)]
    parts = [Part("json", place.meta_at, place.meta_size)] if place.meta_size else []
    return [*parts, Part("audio", place.audio_at, place.audio_size)] if place.audio_size else parts


def record_of(texts: Mapping[str, bytes], clips: int, reading: Reading) -> Record:
    """Parse the members of a sample other than its audio, by suffix; the JSON has precedence.

    Raises:
        BadAudio: they are no text, or not such that can be trained on.
    """
    fields = parse_json(texts["json"]) if "json" in texts else {}
    if not any(key in reading.renamed(fields) for key in (*ANSWER_KEYS, *TURNS_KEYS)):
        suffix = next((suffix for suffix in ANSWER_SUFFIXES if suffix in texts), None)
        if suffix is not None:
            try:
                fields = {**fields, "answer": texts[suffix].decode("utf-8-sig").strip()}
            except UnicodeDecodeError as error:
                raise BadAudio("unreadable", f"its .{suffix}: {error}") from error
    return parse_record(fields, reading, clips)


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the object of a JSON; BadAudio if it is none."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise BadAudio("unreadable", f"JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadAudio("unreadable", "JSON is not an object")
    return fields


def read(places: list[Place]) -> Iterator[Sample | BadSample]:
    """Read samples by byte range."""
    files = {shard: plain(shard) for shard in {place.shard for place in places}}
    parts = [parts_of(place) for place in places]
    ranges = [
        (files[place.shard] if part.path is None else plain(part.path), part.at, part.size)
        for place, own in zip(places, parts, strict=True)
        for part in own
        if part.at != INLINE
    ]
    contents = read_ranges(ranges)
    for place, own in zip(places, parts, strict=True):
        yield _sample(place, own, [_inline(part) if part.at == INLINE else next(contents) for part in own])


def _inline(part: Part) -> bytes:
    assert part.path is not None, "an inline part is its text"
    return part.path.encode()


def _sample(place: Place, parts: Sequence[Part], contents: Sequence[bytes | OSError]) -> Sample | BadSample:
    try:
        texts: dict[str, bytes] = {}
        clips: list[bytes] = []
        for part, content in zip(parts, contents, strict=True):
            if isinstance(content, OSError):
                raise BadAudio("unreadable", str(content))
            if len(content) < part.size:
                raise BadAudio("broken_shard", f"{part.path or place.shard} has become shorter")
            if is_audio(part):
                clips.append(content)
            else:
                texts[part.suffix] = content
        return make_sample(place, record_of(texts, len(clips), place.reading), clips)
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_sample(place, bad_audio(error))


def is_audio(part: Part) -> bool:
    """Whether a part is a clip; `audio` stands for one that is known by its first bytes."""
    return part.suffix == "audio" or part.suffix in AUDIO_SUFFIXES
