"""Decoded audio and features of frozen encoders, kept in a folder for all runs that read the same shards.

    FOLDER/audio-VERSION/SHARD KEY.arrow  a row for each clip of the shard's usable samples, in the order of the index
    FOLDER/ENCODER KEY/SHARD KEY.arrow    a row for each clip, in any order

FOLDER is a path that every node sees, or a URL. Names identify the content of files, which never change
(`cached_shards.py`).
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import soundfile
import soxr

from mowe_ray.data.cached_shards import open_cached, read_cells, whole_names
from mowe_ray.data.index import Index, marked_shards
from mowe_ray.data.micro_batch import Features, MicroBatch
from mowe_ray.data.sample import BadSample, Turn
from mowe_ray.data.shards.record import sample_of_texts
from mowe_ray.data.shards.storage import file_system, retried

_VERSION = 3  # raise it when the same samples would be decoded to something else
_TEXTS = ("instruction", "answer", "references", "choices", "groups")
_PLACE = ("audio_at", "audio_size", "meta_at", "meta_size")


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
    def read(cls, note: str) -> "CachedEncoder | None":
        """Read what `to_json` wrote; None if it is not there, or damaged."""
        fs, inner = file_system(note)
        try:
            fields = json.loads(retried(note, lambda: fs.cat_file(inner)))
            return cls(encoder_index=fields.pop("place"), **fields)
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None


@dataclass(frozen=True)
class FeatureCache:
    """Cache of decoded audio and frozen-encoder features of a run.

    Attributes:
        folder: Of the cache; every node sees it. A path or URL.
        shards: The key of each shard of the run, by its path and, where a source takes it in its own way, a mark.
        encoders: Encoders whose features are kept.
        part: In the names of files until they are whole, to tell those of one pass from others.
    """

    folder: str
    shards: dict[str, str]
    encoders: list[CachedEncoder]
    part: str = field(default="", compare=False)

    def audio_path(self, shard: str) -> str:
        """Return the file with the decoded audio of a shard."""
        return f"{self.folder}/audio-{_VERSION}/{self.shards[shard]}.arrow"

    def features_path(self, encoder: CachedEncoder, shard: str) -> str:
        """Return the file with an encoder's features of a shard."""
        return f"{self.folder}/{encoder.key}/{self.shards[shard]}.arrow"

    def missing(self) -> dict[str, list[CachedEncoder]]:
        """Return the shards of which something is not there yet, with the encoders whose features are not.

        Each folder is listed once, and no file opened: one that has its name was complete when it got it. What a disk
        has done to it since is found when it is read.
        """
        with_audio = whole_names(f"{self.folder}/audio-{_VERSION}")
        with_features = [(encoder, whole_names(f"{self.folder}/{encoder.key}")) for encoder in self.encoders]
        lacking = {}
        for shard, key in self.shards.items():
            encoders = [encoder for encoder, names in with_features if f"{key}.arrow" not in names]
            if encoders or f"{key}.arrow" not in with_audio:
                lacking[shard] = encoders
        return lacking

    def load(self, rows: pa.Table) -> MicroBatch:
        """Return what `load_micro_batch` makes of rows of `Index.table`, and the features of its clips."""
        shards, numbers = marked_shards(rows), rows["row"].to_pylist()
        names = zip(*(rows[name].to_pylist() for name in ("id", "task", "source")), strict=True)
        batch = MicroBatch(np.zeros(0, np.int16), [], [], [], [], [], [], [], [], [])
        clips: list[npt.NDArray[np.int16]] = []
        with_audio: list[tuple[str, int]] = []
        files = [open_cached(self.audio_path(shard)) for shard in shards]
        places = [file.rows_of(number) for file, number in zip(files, numbers, strict=True)]
        cells = iter(read_cells([(file, row) for file, rows in zip(files, places, strict=True) for row in rows]))
        for shard, file, of_sample, (sample_id, task, source) in zip(shards, files, places, names, strict=True):
            own_clips, first = [next(cells).view(np.int16) for _ in of_sample], of_sample.start
            if cause := file.table["cause"][first].as_py():
                batch.bad.append(BadSample(sample_id, source, cause, file.table["detail"][first].as_py()))
                continue
            clips += own_clips
            with_audio += [(shard, row) for row, clip in zip(of_sample, own_clips, strict=True) if len(clip)]
            batch.lengths.extend(map(len, own_clips))
            batch.scales.extend(file.table["scale"][row].as_py() for row in of_sample)
            batch.counts.append(len(own_clips))
            texts = {name: file.table[name][first].as_py() for name in _TEXTS if name in file.table.column_names}
            batch.add_texts(sample_of_texts(texts, sample_id, task, source))
            kept = file.table["history"][first].as_py() if "history" in file.table.column_names else None
            batch.histories.append([Turn(*turn) for turn in json.loads(kept or "[]")])
        features = [self._features(encoder, with_audio) for encoder in self.encoders]
        audio = np.concatenate([batch.audio, *clips])
        histories = batch.histories if any(batch.histories) else []
        counts = batch.counts if any(count > 1 for count in batch.counts) else []
        return replace(batch, audio=audio, features=features, histories=histories, counts=counts)

    def _features(self, encoder: CachedEncoder, clips: list[tuple[str, int]]) -> Features:
        files = [open_cached(self.features_path(encoder, shard)) for shard, _ in clips]
        places = [int(file.place[number]) for file, (_, number) in zip(files, clips, strict=True)]
        cells = read_cells(list(zip(files, places, strict=True)))
        frames = [file.table["frames"][place].as_py() for file, place in zip(files, places, strict=True)]
        values = np.concatenate([np.zeros(0, np.uint8), *cells]).view(np.uint16)
        return Features(encoder.encoder_index, encoder.layers, encoder.width, frames, values)


def shard_rows(index: Index, min_s: float, max_s: float) -> dict[str, tuple[str, pa.Table]]:
    """Return the key and the rows of each shard of `index`, by its name in `FeatureCache.shards`.

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
        if pc.any(pc.greater(rows["turns"], 1)).as_py():
            digest.update(b"turns")  # files of before they were kept are others
        blank = pa.array([""] * len(rows))
        name = marked_shards(rows.slice(0, 1))[0]
        columns = {"id": rows["id"], "source": rows["source"], "task": blank, "shard": [shard] * len(rows)}
        columns |= {"cached": [name] * len(rows)}
        columns |= {"duration_s": rows["duration_s"], "parts": rows["parts"], **dict(zip(_PLACE, places, strict=True))}
        keyed[name] = digest.hexdigest(), pa.table(columns, metadata=table.schema.metadata)
    return keyed


def decoder_versions() -> str:
    """Name the versions of all that decides on a decoded wave."""
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    resampler = getattr(soxr, "__libsoxr_version__", "")
    sndfile = soundfile.__libsndfile_version__
    return f"av {av.__version__} libavcodec {ffmpeg} libsndfile {sndfile} soxr {soxr.__version__} {resampler}"
