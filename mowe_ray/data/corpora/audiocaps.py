"""AudioCaps: captions of ten-second YouTube clips, which everybody downloads on their own.

    dataset/train.csv  dataset/val.csv  dataset/test.csv      audiocap_id,youtube_id,start_time,caption

are published (github.com/cdjkim/audiocaps). The clips are looked for by the names that the two usual downloaders give
them: YOUTUBEID_STARTTIME (aac-datasets) or AUDIOCAPID (audiocaps-download), with any suffix, anywhere in the folder.
Deleted videos are counted as missing audio.
"""

from collections.abc import Iterator
from pathlib import Path

from mowe_ray.data.corpora.layout import Defaults, audio_by_stem, find, need, read_csv
from mowe_ray.data.sample import BadSample, Sample

SPLITS = ("train", "val", "test")
_COLUMNS = {"audiocap_id", "youtube_id", "start_time", "caption"}


def is_audiocaps(path: Path) -> bool:
    """Whether a folder holds a table with AudioCaps' columns."""
    tables = (find(path, f"{split}.csv") for split in SPLITS)
    return any(table is not None and next(read_csv(table), {}).keys() >= _COLUMNS for table in tables)


def read_audiocaps(folder: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split.

    A clip of val or test is one sample with its five captions as references. In train each caption is a sample, so that
    nothing is lost to learn from (there is one a clip, almost always).

    Args:
        folder: with the CSV of the split and the clips in it.
        defaults: task and instruction.
        split: one of SPLITS.

    Raises:
        ValueError: there is no table of the split.
    """
    clips = audio_by_stem(folder)
    table = need(folder, f"{split}.csv", "AudioCaps")
    captions: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for row in read_csv(table, *_COLUMNS):
        clip = f"{row['youtube_id']}_{row['start_time']}"
        captions.setdefault(clip, []).append(row["caption"])
        names.setdefault(clip, [clip]).append(row["audiocap_id"])
    for clip, texts in captions.items():
        audio = next((clips[name] for name in names[clip] if name in clips), folder / clip)
        fields = {"id": clip, "audio": str(audio.absolute())}
        for answer in texts if split == "train" else [texts]:
            yield defaults.sample({**fields, "answer": answer}, clip, folder)
