"""WavCaps: machine-written captions of clips from four sources.

    json_files/AudioSet_SL/as_final.json           {"data": [{"id": "Yb0RFKhbpFJA.wav", "caption": ..., ...}, ...]}
    json_files/BBC_Sound_Effects/bbc_final.json    ids without a suffix, here and below
    json_files/FreeSound/fsd_final.json
    json_files/SoundBible/sb_final.json
    Zip_files/SOURCE/SOURCE.z*                     parts of one archive, which holds .../waveforms/SOURCE_flac/ID.flac

as on huggingface.co/datasets/cvssp/WavCaps. Merge and unpack the archives first. The clips are looked for in any folder
called SOURCE_flac, or SOURCE as aac-datasets calls it (whose reader these facts are from). The archive of FreeSound is
known to hold fewer clips than the JSON names: they are counted as missing audio.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from mowe_ray.data.corpora.layout import Defaults, audio_by_stem, find
from mowe_ray.data.sample import BadSample, Sample

_JSON = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}
SPLITS = tuple(_JSON)


def is_wavcaps(path: Path) -> bool:
    """Whether a folder holds the JSON of a source."""
    return any(_json_of(path, source) for source in SPLITS)


def read_wavcaps(folder: Path, defaults: Defaults, source: str | None = None) -> Iterator[Sample | BadSample]:
    """Read the sources that are there, one caption a clip; all of WavCaps is for training.

    Args:
        folder: with `json_files` and the unpacked clips in it.
        defaults: task and instruction.
        source: only this one of SPLITS; None = all that are there.

    Raises:
        ValueError: there is no JSON of the source.
    """
    tables = {name: _json_of(folder, name) for name in ([source] if source else SPLITS)}
    if not any(tables.values()):
        raise ValueError(f"{folder}: no json_files/{source or 'SOURCE'}/*_final.json, so this is not WavCaps's layout")
    for name, table in tables.items():
        if table is None:
            continue
        clips: dict[str, Path] = {}
        for place in sorted(folder.rglob(f"{name}*")):  # the archives unpack into a deep path of their makers' machine
            if place.name in (name, f"{name}_flac") and place.is_dir():
                clips |= audio_by_stem(place)
        for entry in json.loads(table.read_text(encoding="utf-8"))["data"]:
            stem = str(entry["id"]).removesuffix(".wav")
            clip = clips.get(stem, folder / f"{name}_flac" / f"{stem}.flac")
            yield defaults.file(clip, f"{name}-{stem}", str(entry.get("caption") or ""))


def _json_of(folder: Path, source: str) -> Path | None:
    return find(folder, f"{source}/{_JSON[source]}")
