"""Samples to shards, as `mowe_ray.prepare` and the built-in corpus write them.

The same samples give the same bytes: no times, no owners, no dependence on the machine. Audio is
copied as it is, and every sample carries its duration, so that indexing opens no audio.
"""

import io
import json
import posixpath
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mowe_ray.data.audio_headers import suffix_of
from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import AUDIO_SUFFIXES, CLIP, BadAudio, Sample, Turn
from mowe_ray.data.shards.completion import WrittenShard, hash_ids
from mowe_ray.data.shards.fields import as_text
from mowe_ray.data.shards.storage import is_remote, whole_file

_SHARD_BYTES = 256 << 20
_GROUP_BYTES = 2 << 20  # shuffled reading fetches a row group for every sample

_PARQUET_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("instruction", pa.string()),
        ("answer", pa.string()),
        ("task", pa.string()),
        ("duration", pa.float64()),
        ("references", pa.list_(pa.string())),
        ("choices", pa.list_(pa.string())),
        ("groups", pa.string()),  # JSON
        ("messages", pa.string()),  # JSON, of conversations
        ("audios", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),  # of samples with several
        ("others", pa.string()),  # JSON, of what else a row says
    ]
)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the content of each shard by path, and `seconds` of audio in all."""

    contents: dict[str, WrittenShard] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def shards(self) -> list[str]:
        """Paths of the shards, in order."""
        return list(self.contents)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.contents.values())


AfterShard = Callable[[str, str], None]
"""Called with the path of a shard that was written, and with that of a file of this machine that holds the same."""


def write_webdataset(
    samples: Iterable[Sample],
    out: str,
    shard_bytes: int = _SHARD_BYTES,
    after: Written | None = None,
    after_shard: AfterShard | None = None,
) -> Written:
    """Write `OUT/00000.tar`, ... of about `shard_bytes`, with KEY.SUFFIX and KEY.json a sample.

    Args:
        after: Shards that are there already; the next are numbered from there on.
    """
    return _write(samples, out, shard_bytes, after, "tar", _write_tar, after_shard)


def write_parquet(
    samples: Iterable[Sample],
    out: str,
    shard_bytes: int = _SHARD_BYTES,
    after: Written | None = None,
    after_shard: AfterShard | None = None,
) -> Written:
    """Write `OUT/00000.parquet`, ... in the Hugging Face layout, with row groups of about 2 MiB; see above."""
    return _write(samples, out, shard_bytes, after, "parquet", _write_table, after_shard)


def _write(
    samples: Iterable[Sample],
    out: str,
    shard_bytes: int,
    after: Written | None,
    suffix: str,
    write: Callable[[BinaryIO, Iterator[Sample], int], Iterator[dict[str, Any]]],
    after_shard: AfterShard | None,
) -> Written:
    """Write shards with a writer of one, which takes the number of its first sample and yields the fields of each."""
    contents, seconds = (dict(after.contents), after.seconds) if after else ({}, 0.0)
    count = sum(shard.samples for shard in contents.values())
    for entries in _split(samples, shard_bytes):
        path = posixpath.join(out, f"{len(contents):05d}.{suffix}")
        ids = []
        with _shard_file(path, after_shard) as file:
            for fields in write(file, entries, count):
                ids.append(as_text(fields["id"]))
                seconds += fields.get("duration") or 0.0
            size = file.tell()
        contents[path] = WrittenShard(len(ids), size, hash_ids(pa.array(ids, pa.string())))
        count += len(ids)
    return Written(contents, seconds)


@contextmanager
def _shard_file(path: str, after_shard: AfterShard | None) -> Iterator[BinaryIO]:
    """Write a shard; a remote one that is read afterwards is written to this machine first."""
    if after_shard is None or not is_remote(path):
        with whole_file(path) as file:
            yield file
        if after_shard is not None:
            after_shard(path, path)
        return
    with NamedTemporaryFile(suffix=f".{path.rpartition('.')[2]}") as copy:
        yield cast(BinaryIO, copy)
        copy.seek(0)
        with whole_file(path) as file:
            shutil.copyfileobj(copy, file, 1 << 20)
        after_shard(path, copy.name)


def _write_tar(file: BinaryIO, samples: Iterator[Sample], first: int) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for number, sample in enumerate(samples, first):
            key = f"{number:09d}"
            names = _names(sample, key)
            fields = _fields(sample) | ({"audios": names} if len(names) > 1 else {})
            for name, clip in zip(names, sample.clips, strict=True):
                _add(archive, name, clip)
            _add(archive, f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())
            yield fields


def _write_table(file: BinaryIO, samples: Iterator[Sample], first: int) -> Iterator[dict[str, Any]]:
    with pq.ParquetWriter(file, _PARQUET_SCHEMA, compression="none", use_dictionary=["task"]) as writer:
        for group in _split(samples, _GROUP_BYTES):
            rows = [_parquet_row(sample, number) for number, sample in enumerate(group, first)]
            writer.write_table(pa.Table.from_pylist(rows, schema=_PARQUET_SCHEMA))
            first += len(rows)
            yield from rows


def _split(samples: Iterable[Sample], limit: int) -> Iterator[Iterator[Sample]]:
    """Cut a stream into streams of about `limit` bytes of audio; consume each before the next."""
    source = iter(samples)
    first = next(source, None)

    def part() -> Iterator[Sample]:
        nonlocal first
        size = 0
        while first is not None and size < limit:
            size += sum(map(len, first.clips)) + len(first.answer)
            sample, first = first, next(source, None)
            yield sample

    while first is not None:
        yield part()


def _fields(sample: Sample) -> dict[str, Any]:
    """The JSON of a sample, without a duration if that cannot be determined: the index then checks the audio."""
    fields: dict[str, Any] = {**sample.others, "id": sample.id}
    if sample.history or sample.more_audio or CLIP in sample.instruction:
        fields["messages"] = _messages(sample)
    else:
        fields |= {"instruction": sample.instruction, "answer": sample.answer}
    fields["task"] = sample.task
    if sample.references:
        fields["references"] = list(sample.references)
    if sample.choices:
        fields["choices"] = list(sample.choices)
    if sample.groups:
        fields["groups"] = dict(sample.groups)
    if sample.audio is not None:
        with suppress(BadAudio):
            fields["duration"] = round(sample.duration_s or sum(map(header_duration_s, sample.clips)), 4)
        if sample.offset_s is not None:
            fields["offset"] = sample.offset_s
    return fields


def _messages(sample: Sample) -> list[dict[str, Any]]:
    """Return the turns of a conversation as parts, so that a text which names a place of a clip stays text."""
    turns = [*sample.history, Turn("user", sample.instruction), Turn("assistant", sample.answer)]
    messages = []
    for turn in turns:
        content: Any = turn.text
        if turn.role == "user":
            texts = [[{"type": "text", "text": text}] if text else [] for text in turn.text.split(CLIP)]
            content = [*texts[0], *(part for text in texts[1:] for part in ({"type": "audio"}, *text))]
        messages.append({"role": turn.role, "content": content} | ({} if turn.learned else {"loss": False}))
    return messages


def _parquet_row(sample: Sample, number: int) -> dict[str, Any]:
    fields = _fields(sample)
    names = _names(sample, f"{number:09d}")
    clips = [{"bytes": clip, "path": name} for clip, name in zip(sample.clips, names, strict=True)]
    row = {"audio": clips[0] if len(clips) == 1 else None, "audios": clips if len(clips) > 1 else None}
    as_json: dict[str, Any] = {name: fields[name] for name in ("messages", "groups") if name in fields}
    as_json |= {"others": dict(sample.others)} if sample.others else {}
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in as_json.items()}
    empty = dict.fromkeys(_PARQUET_SCHEMA.names)
    known = {name: value for name, value in fields.items() if name in empty}
    return {**empty, **known, **row, **texts}


def _names(sample: Sample, key: str) -> list[str]:
    """Return the names of a sample's clips: `KEY.flac`, or `KEY.0.flac`, `KEY.1.flac`..."""
    suffixes = [_suffix(clip, sample.suffix) for clip in sample.clips]
    if len(suffixes) == 1:
        return [f"{key}.{suffixes[0]}"]
    return [f"{key}.{number}.{suffix}" for number, suffix in enumerate(suffixes)]


def _suffix(clip: bytes, named: str) -> str:
    """Prefer the bytes over the name: a reader may trust the suffix."""
    return suffix_of(clip) or (named if named in AUDIO_SUFFIXES else "wav")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, user and group are zero unless set
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
