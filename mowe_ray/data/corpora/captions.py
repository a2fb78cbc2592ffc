"""Corpora of captioned sounds: AudioCaps and WavCaps.

AudioCaps: captions of ten-second YouTube clips, which users download themselves.

    dataset/train.csv  dataset/val.csv  dataset/test.csv      audiocap_id,youtube_id,start_time,caption

are published (github.com/cdjkim/audiocaps). The clips are looked for by the names that the two usual downloaders give
them: YOUTUBEID_STARTTIME (aac-datasets) or AUDIOCAPID (audiocaps-download), with any suffix, anywhere in the folder.
Deleted videos are counted as missing audio.

WavCaps: machine-written captions of clips from four sources.

    json_files/AudioSet_SL/as_final.json           {"data": [{"id": "Yb0RFKhbpFJA.wav", "caption": ..., ...}, ...]}
    json_files/BBC_Sound_Effects/bbc_final.json    ids without a suffix, here and below
    json_files/FreeSound/fsd_final.json
    json_files/SoundBible/sb_final.json
    Zip_files/SOURCE/SOURCE.z*                     parts of one archive, which holds .../waveforms/SOURCE_flac/ID.flac

as on huggingface.co/datasets/cvssp/WavCaps. Merge and unpack the archives first. The clips are looked for in any folder
called SOURCE_flac, or SOURCE as aac-datasets calls it (whose reader these facts are from). The archive of FreeSound is
known to hold fewer clips than the JSON names: they are counted as missing audio.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mowe_ray.data.corpora.layout import Defaults, audio_by_stem, each_row, find, need, read_csv, read_json
from mowe_ray.data.sample import BadSample, Sample

AUDIOCAPS_SPLITS = ("train", "val", "test")
_AUDIOCAPS_COLUMNS = {"audiocap_id", "youtube_id", "start_time", "caption"}


def is_audiocaps(path: Path) -> bool:
    """Whether a folder holds a table with AudioCaps' columns."""
    tables = (find(path, f"{split}.csv") for split in AUDIOCAPS_SPLITS)
    return any(table is not None and next(read_csv(table), {}).keys() >= _AUDIOCAPS_COLUMNS for table in tables)


def read_audiocaps(folder: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split.

    A clip of val or test is one sample with its five captions as references. In train each caption is a sample, so that
    nothing is lost to learn from (there is one a clip, almost always).

    Args:
        folder: with the CSV of the split and the clips in it.
        defaults: task and instruction.
        split: one of AUDIOCAPS_SPLITS.

    Raises:
        ValueError: there is no table of the split.
    """
    clips = audio_by_stem(folder)
    table = need(folder, f"{split}.csv", "AudioCaps")
    captions: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for row in read_csv(table, *_AUDIOCAPS_COLUMNS):
        clip = f"{row['youtube_id']}_{row['start_time']}"
        captions.setdefault(clip, []).append(row["caption"])
        names.setdefault(clip, [clip]).append(row["audiocap_id"])
    for clip, texts in captions.items():
        audio = next((clips[name] for name in names[clip] if name in clips), folder / clip)
        fields = {"id": clip, "audio": str(audio.absolute())}
        for answer in texts if split == "train" else [texts]:
            yield defaults.sample({**fields, "answer": answer}, clip, folder)


_WAVCAPS_JSON = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}
WAVCAPS_SOURCES = tuple(_WAVCAPS_JSON)


def is_wavcaps(path: Path) -> bool:
    """Whether a folder holds the JSON of a source."""
    return any(_wavcaps_json(path, source) for source in WAVCAPS_SOURCES)


def read_wavcaps(folder: Path, defaults: Defaults, source: str | None = None) -> Iterator[Sample | BadSample]:
    """Read the sources that are there, one caption a clip; all of WavCaps is for training.

    Args:
        folder: with `json_files` and the unpacked clips in it.
        defaults: task and instruction.
        source: only this one of WAVCAPS_SOURCES; None = all that are there.

    Raises:
        ValueError: there is no JSON of the source.
    """
    tables = {name: _wavcaps_json(folder, name) for name in ([source] if source else WAVCAPS_SOURCES)}
    if not any(tables.values()):
        raise ValueError(f"{folder}: no json_files/{source or 'SOURCE'}/*_final.json, so this is not WavCaps's layout")
    for name, table in tables.items():
        if table is None:
            continue
        clips: dict[str, Path] = {}
        for place in sorted(folder.rglob(f"{name}*")):  # the archives unpack into a deep path of their makers' machine
            if place.name in (name, f"{name}_flac") and place.is_dir():
                clips |= audio_by_stem(place)
        made = partial(_wavcaps_clip, name=name, clips=clips, folder=folder, defaults=defaults)
        yield from each_row(read_json(table)["data"], made, table, defaults.source)


def _wavcaps_clip(
    entry: dict[str, Any], name: str, clips: dict[str, Path], folder: Path, defaults: Defaults
) -> Iterator[Sample | BadSample]:
    stem = str(entry["id"]).removesuffix(".wav")
    clip = clips.get(stem, folder / f"{name}_flac" / f"{stem}.flac")
    yield defaults.file(clip, f"{name}-{stem}", str(entry.get("caption") or ""))


def _wavcaps_json(folder: Path, source: str) -> Path | None:
    return find(folder, f"{source}/{_WAVCAPS_JSON[source]}")
