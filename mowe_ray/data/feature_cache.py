"""Decoded audio and features of frozen encoders, kept in a folder for all runs that read the same shards.

    FOLDER/audio-VERSION/SHARD KEY.arrow  a row for each usable sample of the shard, in the order of the index
    FOLDER/ENCODER KEY/SHARD KEY.arrow    a row for each clip, in any order

Files are written atomically and never change: their names identify their content. Readers map it into memory, and
compare each row with its checksum; files of before there were checksums are taken as they are.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import soundfile
import soxr

from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import Features, MicroBatch, load_in_child, load_micro_batch, read_cell
from mowe_ray.data.sample import BadSample
from mowe_ray.data.shards.record import sample_of_texts
from mowe_ray.output.run_folder import sync

_VERSION = 3  # raise it when the same samples would be decoded to something else
_CHUNK_ROWS = 64  # samples that are decoded, and lie in memory, together
_ABANDONED_S = 3600.0  # a writer adds to its part every few seconds
_TEXTS = ("instruction", "answer", "references", "choices", "groups")
_PLACE = ("audio_at", "audio_size", "meta_at", "meta_size")
_AUDIO_SCHEMA = pa.schema(
    [
        ("samples", pa.large_binary()),  # int16; empty for text alone and for bad samples
        ("length", pa.int32()),
        ("scale", pa.float64()),
        ("instruction", pa.string()),
        ("answer", pa.string()),
        ("references", pa.list_(pa.string())),
        ("choices", pa.list_(pa.string())),  # older files have neither these nor groups
        ("groups", pa.map_(pa.string(), pa.string())),
        ("cause", pa.string()),
        ("detail", pa.string()),
        ("crc32", pa.uint32()),  # of the other columns
    ]
)
_FEATURES_SCHEMA = pa.schema(
    [("row", pa.int32()), ("frames", pa.int32()), ("values", pa.large_binary()), ("crc32", pa.uint32())]
)


@dataclass(frozen=True)
class CachedEncoder:
    """An encoder whose features are kept.

    Attributes:
        key: Content hash of everything that determines its features: weights, configuration and front-end.
        label: Its name in messages.
        encoder_index: Index in the model: 0 is the base encoder, then comes the pool.
        layers: Layers kept of it, each `width` wide.
        bytes_per_s: Of features, for a second of audio.
    """

    key: str
    label: str
    encoder_index: int
    layers: int
    width: int
    bytes_per_s: float

    def to_json(self) -> str:
        """Return the content of the encoder's note in the cache."""
        # `place` is the key that earlier versions wrote.
        return json.dumps({"place" if name == "encoder_index" else name: value for name, value in asdict(self).items()})

    @classmethod
    def read(cls, note: Path) -> "CachedEncoder | None":
        """Read what `to_json` wrote; None if it is not there, or damaged."""
        try:
            fields = json.loads(note.read_bytes())
            return cls(encoder_index=fields.pop("place"), **fields)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None


@dataclass(frozen=True)
class FeatureCache:
    """Cache of decoded audio and frozen-encoder features of a run.

    Attributes:
        folder: Of the cache; every node sees it.
        shards: The key of each shard of the run, by its path.
        encoders: Encoders whose features are kept.
    """

    folder: str
    shards: dict[str, str]
    encoders: list[CachedEncoder]

    def audio_path(self, shard: str) -> Path:
        """Return the file with the decoded audio of a shard."""
        return Path(self.folder, f"audio-{_VERSION}", f"{self.shards[shard]}.arrow")

    def features_path(self, encoder: CachedEncoder, shard: str) -> Path:
        """Return the file with an encoder's features of a shard."""
        return Path(self.folder, encoder.key, f"{self.shards[shard]}.arrow")

    def missing(self) -> dict[str, list[CachedEncoder]]:
        """Return the shards of which something is not there yet, with the encoders whose features are not.

        Each folder is listed once, and no file opened: one that has its name was complete when it got it. What a disk
        has done to it since is found when it is read.
        """
        with_audio = _names(Path(self.folder, f"audio-{_VERSION}"))
        with_features = [(encoder, _names(Path(self.folder, encoder.key))) for encoder in self.encoders]
        lacking = {}
        for shard, key in self.shards.items():
            encoders = [encoder for encoder, names in with_features if f"{key}.arrow" not in names]
            if encoders or f"{key}.arrow" not in with_audio:
                lacking[shard] = encoders
        return lacking

    def load(self, rows: pa.Table) -> MicroBatch:
        """Return what `load_micro_batch` makes of rows of `Index.table`, and the features of its clips."""
        shards, numbers = rows["shard"].to_pylist(), rows["row"].to_pylist()
        names = zip(*(rows[name].to_pylist() for name in ("id", "task", "source")), strict=True)
        batch = MicroBatch(np.zeros(0, np.int16), [], [], [], [], [], [], [], [], [])
        clips: list[npt.NDArray[np.int16]] = []
        with_audio: list[tuple[str, int]] = []
        for shard, number, (sample_id, task, source) in zip(shards, numbers, names, strict=True):
            audio = open_audio(self.audio_path(shard))
            audio.check(number)
            if cause := audio.table["cause"][number].as_py():
                batch.bad.append(BadSample(sample_id, source, cause, audio.table["detail"][number].as_py()))
                continue
            clips.append(audio.samples(number))
            if len(clips[-1]):
                with_audio.append((shard, number))
            batch.lengths.append(len(clips[-1]))
            batch.scales.append(audio.table["scale"][number].as_py())
            texts = {name: audio.table[name][number].as_py() for name in _TEXTS if name in audio.table.column_names}
            batch.add_texts(sample_of_texts(texts, sample_id, task, source))
        features = [self._features(encoder, with_audio) for encoder in self.encoders]
        return MicroBatch(**{**vars(batch), "audio": np.concatenate([batch.audio, *clips]), "features": features})

    def _features(self, encoder: CachedEncoder, clips: list[tuple[str, int]]) -> Features:
        files = [_features(str(self.features_path(encoder, shard))) for shard, _ in clips]
        places = [int(file.place[number]) for file, (_, number) in zip(files, clips, strict=True)]
        for (shard, _), file, place in zip(clips, files, places, strict=True):
            _check_row(self.features_path(encoder, shard), file.table, place)
        cells = [read_cell(file.table["values"], place) for file, place in zip(files, places, strict=True)]
        frames = [file.table["frames"][place].as_py() for file, place in zip(files, places, strict=True)]
        values = np.concatenate([np.zeros(0, np.uint8), *cells]).view(np.uint16)
        return Features(encoder.encoder_index, encoder.layers, encoder.width, frames, values)


def shard_rows(index: Index, min_s: float, max_s: float) -> dict[str, tuple[str, pa.Table]]:
    """Return the key and the rows of each shard of `index`, by its path.

    The key identifies which samples of which version of the shard are decoded within which limits and by which
    decoders, independent of the task, source and id that the run gives them. Of these the rows have the ids alone.
    """
    table, shards = index.table, index.shards
    starts = np.searchsorted(shards, np.arange(len(index.shard_names) + 1))
    keyed = {}
    for number, shard in enumerate(index.shard_names):
        rows = table.slice(starts[number], starts[number + 1] - starts[number])
        if not len(rows):
            continue
        origin = (shard, index.fingerprints[number], min_s, max_s, decoder_versions())
        digest = hashlib.blake2b(repr(origin).encode(), digest_size=16)
        places = [rows[name].combine_chunks() for name in _PLACE]
        for place in places:
            digest.update(np.ascontiguousarray(place.to_numpy(zero_copy_only=False)).astype(np.int64).tobytes())
        blank = pa.array([""] * len(rows))
        columns = {"id": rows["id"], "source": rows["source"], "task": blank, "shard": [shard] * len(rows)}
        columns |= {"duration_s": rows["duration_s"], "parts": rows["parts"], **dict(zip(_PLACE, places, strict=True))}
        keyed[shard] = digest.hexdigest(), pa.table(columns, metadata=table.schema.metadata)
    return keyed


def decoder_versions() -> str:
    """Name the versions of all that decides on a decoded wave."""
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    resampler = getattr(soxr, "__libsoxr_version__", "")
    sndfile = soundfile.__libsndfile_version__
    return f"av {av.__version__} libavcodec {ffmpeg} libsndfile {sndfile} soxr {soxr.__version__} {resampler}"


def write_audio(path: Path, rows: pa.Table, min_s: float, max_s: float, *, in_child: bool = False) -> None:
    """Decode a shard's rows, as `shard_rows` returns them, into a file.

    Args:
        in_child: for rows that have ended the process that decoded them.
    """
    load = load_in_child if in_child else load_micro_batch
    with _atomic_file(path, _AUDIO_SCHEMA) as writer:
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = rows.slice(start, _CHUNK_ROWS)
            table = _audio_table(load(chunk, min_s, max_s), chunk["id"].to_pylist())
            writer.write_table(_with_checksums(table, _AUDIO_SCHEMA))


def _audio_table(batch: MicroBatch, ids: list[str]) -> pa.Table:
    good, bad = {name: i for i, name in enumerate(batch.ids)}, {sample.id: sample for sample in batch.bad}
    lengths = [batch.lengths[good[name]] if name in good else 0 for name in ids]
    offsets = np.concatenate([[0], 2 * np.cumsum(lengths)]).astype(np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(batch.audio))]

    def column(values: list[Any]) -> list[Any]:
        return [values[good[name]] if name in good else None for name in ids]

    return pa.table(
        {
            "samples": pa.Array.from_buffers(pa.large_binary(), len(ids), buffers),
            "length": lengths,
            "scale": column(batch.scales),
            "instruction": column(batch.instructions),
            "answer": column(batch.answers),
            "references": column(batch.references),
            "choices": column(batch.choices),
            "groups": column([list(groups.items()) for groups in batch.groups]),
            "cause": [bad[name].cause if name in bad else None for name in ids],
            "detail": [bad[name].detail if name in bad else None for name in ids],
        },
        schema=pa.schema(list(_AUDIO_SCHEMA)[:-1]),
    )


def write_features(path: Path, batches: Iterable[tuple[list[int], list[npt.NDArray[np.uint16]]]]) -> None:
    """Write an encoder's features of a shard: rows of its audio file, and (L, frames, E) of each."""
    with _atomic_file(path, _FEATURES_SCHEMA) as writer:
        for rows, features in batches:
            sizes = [0, *(values.nbytes for values in features)]
            buffers = [
                None,
                pa.py_buffer(np.cumsum(sizes).astype(np.int64)),
                pa.py_buffer(np.concatenate([values.ravel() for values in features])),
            ]
            cells = pa.Array.from_buffers(pa.large_binary(), len(rows), buffers)
            frames = [values.shape[1] for values in features]
            table = pa.table(
                {"row": rows, "frames": frames, "values": cells}, schema=pa.schema(list(_FEATURES_SCHEMA)[:-1])
            )
            writer.write_table(_with_checksums(table, _FEATURES_SCHEMA))


def _with_checksums(table: pa.Table, schema: pa.Schema) -> pa.Table:
    sums = [_checksum(table, row) for row in range(len(table))]
    return table.append_column(schema.field("crc32"), pa.array(sums, pa.uint32()))


def _checksum(table: pa.Table, row: int) -> int:
    """Return the CRC-32 of a row, without its own checksum."""
    crc = 0
    for field in table.schema:
        if field.type == pa.large_binary():
            crc = zlib.crc32(read_cell(table[field.name], row).data, crc)
        elif field.name != "crc32":
            crc = zlib.crc32(repr(table[field.name][row].as_py()).encode(), crc)
    return crc


def _check_row(path: Path, table: pa.Table, row: int) -> None:
    """Raise ValueError for a damaged row; its file is removed, so that it can be computed again."""
    if "crc32" not in table.column_names:
        return
    try:
        if _checksum(table, row) == table["crc32"][row].as_py():
            return
    except (ValueError, IndexError, pa.ArrowException):  # not even text any more, or outside of the file
        pass
    raise _removed(path, "does not match its checksums")


def _removed(path: Path, damage: str) -> ValueError:
    with suppress(OSError):
        path.unlink()
    return ValueError(f"data.feature_cache: {path} {damage} and was removed; run the same command again to compute it")


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 - names, of which a large cache has 100,000
    except FileNotFoundError:
        return set()


@contextmanager
def _atomic_file(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Write under a unique name and rename: readers never see half a file, and two writers do not interfere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            yield writer
        sync(part)  # a machine that goes down must not leave the name without the content
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_abandoned_parts(folder: str) -> None:
    """Remove what writers that were killed have left in a cache: parts that nobody has written to for an hour."""
    for part in Path(folder).glob("*/*.part"):
        with suppress(OSError):  # another run was faster
            if time.time() - part.stat().st_mtime > _ABANDONED_S:
                part.unlink()


def is_complete(path: Path) -> bool:
    """Whether `path` is there and complete."""
    try:
        _open(path)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _open(path: str | Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


@dataclass(frozen=True)
class CachedAudio:
    """The decoded clips of a shard, mapped into memory."""

    path: Path
    table: pa.Table

    def check(self, row: int) -> None:
        """Raise ValueError if a row is not what was written."""
        _check_row(self.path, self.table, row)

    def samples(self, row: int) -> npt.NDArray[np.int16]:
        """Return (S,) samples of a row; none for text alone and for bad samples."""
        return read_cell(self.table["samples"], row).view(np.int16)

    def wave(self, row: int) -> npt.NDArray[np.float32]:
        """Return (S,) samples in -1..1; ValueError as for `check`."""
        self.check(row)
        return self.samples(row).astype(np.float32) * np.float32(self.table["scale"][row].as_py())

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(R,) samples of each row."""
        return self.table["length"].to_numpy()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _CachedFeatures:
    table: pa.Table

    @cached_property
    def place(self) -> npt.NDArray[np.int32]:
        """Where in the table a row of the audio file is."""
        rows = self.table["row"].to_numpy()
        place = np.zeros(int(rows.max(initial=-1)) + 1, np.int32)
        place[rows] = np.arange(len(rows))
        return place


def open_audio(path: Path) -> CachedAudio:
    """Map the decoded audio of a shard into memory.

    Raises:
        FileNotFoundError: It is not there any more.
    """
    return _audio(str(path))


@lru_cache(maxsize=4096)  # a process may map 65,530 files
def _audio(path: str) -> CachedAudio:
    return CachedAudio(Path(path), _reopen(path))


@lru_cache(maxsize=16_384)
def _features(path: str) -> _CachedFeatures:
    return _CachedFeatures(_reopen(path))


def _reopen(path: str) -> pa.Table:
    try:
        return _open(path)
    except FileNotFoundError as error:
        message = f"data.feature_cache: {path} is not there any more; run the same command again to compute it"
        raise FileNotFoundError(message) from error
    except pa.ArrowInvalid as error:
        raise _removed(Path(path), "is cut") from error
