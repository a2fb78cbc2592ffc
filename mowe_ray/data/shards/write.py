"""Samples to shards, as `mowe_ray.prepare` and the built-in corpus write them.

The same samples give the same bytes: no times, no owners, no dependence on the machine. Audio is
copied as it is, and every sample carries its duration, so that indexing opens no audio.
"""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mowe_ray.data.audio_headers import suffix_of
from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import AUDIO_SUFFIXES, BadAudio, Sample
from mowe_ray.data.shards.storage import file_system

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
    ]
)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written; `seconds` of audio."""

    shards: list[str]
    samples: int
    seconds: float


def write_webdataset(samples: Iterable[Sample], out: str, shard_bytes: int = _SHARD_BYTES) -> Written:
    """Write `OUT/00000.tar`, ... of about `shard_bytes`, with KEY.SUFFIX and KEY.json a sample."""
    shards: list[str] = []
    count, seconds = 0, 0.0
    for entries in _split(samples, shard_bytes):
        shards.append(posixpath.join(out, f"{len(shards):05d}.tar"))
        with (
            _create(shards[-1]) as file,
            tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as archive,
        ):
            for sample in entries:
                fields = _fields(sample)
                key = f"{count:09d}"
                if sample.audio is not None:
                    _add(archive, f"{key}.{_suffix(sample)}", sample.audio)
                _add(archive, f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())
                count += 1
                seconds += fields.get("duration", 0.0)
    return Written(shards, count, seconds)


def write_parquet(samples: Iterable[Sample], out: str, shard_bytes: int = _SHARD_BYTES) -> Written:
    """Write `OUT/00000.parquet`, ... in the Hugging Face layout, with row groups of about 2 MiB."""
    shards: list[str] = []
    count, seconds = 0, 0.0
    for entries in _split(samples, shard_bytes):
        shards.append(posixpath.join(out, f"{len(shards):05d}.parquet"))
        with (
            _create(shards[-1]) as file,
            pq.ParquetWriter(file, _PARQUET_SCHEMA, compression="none", use_dictionary=["task"]) as writer,
        ):
            for group in _split(entries, _GROUP_BYTES):
                rows = [_parquet_row(sample, count + i) for i, sample in enumerate(group)]
                writer.write_table(pa.Table.from_pylist(rows, schema=_PARQUET_SCHEMA))
                count += len(rows)
                seconds += sum(row["duration"] or 0.0 for row in rows)
    return Written(shards, count, seconds)


def _split(samples: Iterable[Sample], limit: int) -> Iterator[Iterator[Sample]]:
    """Cut a stream into streams of about `limit` bytes of audio; consume each before the next."""
    source = iter(samples)
    first = next(source, None)

    def part() -> Iterator[Sample]:
        nonlocal first
        size = 0
        while first is not None and size < limit:
            size += len(first.audio or b"") + len(first.answer)
            sample, first = first, next(source, None)
            yield sample

    while first is not None:
        yield part()


def _create(path: str) -> Any:
    fs, inner = file_system(path)
    fs.makedirs(fs._parent(inner), exist_ok=True)
    return fs.open(inner, "wb")


def _fields(sample: Sample) -> dict[str, Any]:
    """The JSON of a sample, without a duration if that cannot be determined: the index then checks the audio."""
    fields: dict[str, Any] = {
        "id": sample.id,
        "instruction": sample.instruction,
        "answer": sample.answer,
        "task": sample.task,
    }
    if sample.references:
        fields["references"] = list(sample.references)
    if sample.audio is not None:
        with suppress(BadAudio):
            fields["duration"] = round(sample.duration_s or header_duration_s(sample.audio), 4)
        if sample.offset_s is not None:
            fields["offset"] = sample.offset_s
    return fields


def _parquet_row(sample: Sample, number: int) -> dict[str, Any]:
    fields = _fields(sample)
    audio = None
    if sample.audio is not None:
        audio = {"bytes": sample.audio, "path": f"{number:09d}.{_suffix(sample)}"}
    return {"references": None, **fields, "audio": audio, "duration": fields.get("duration")}


def _suffix(sample: Sample) -> str:
    """Prefer the bytes over the name: a reader may trust the suffix."""
    assert sample.audio is not None
    known = sample.suffix if sample.suffix in AUDIO_SUFFIXES else "wav"
    return suffix_of(sample.audio) or known


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, user and group are zero unless set
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
