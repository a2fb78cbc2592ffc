"""Folders of audio files whose names are the answers."""

import re
from collections.abc import Iterator
from pathlib import Path

from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.sources.defaults import Defaults, audio_files

LABELS = ("folder", "stem")


def read_labelled_folders(folder: Path, defaults: Defaults, label_from: str = "folder") -> Iterator[Sample | BadSample]:
    """Read every audio file below `folder`.

    Args:
        folder: LABEL/*.wav lie below it; files directly in it have no answer, unless the label is
            taken from the stem.
        defaults: task and instruction.
        label_from: the answer is the name of the folder that holds the file, or the file's own name
            without suffix (`phonetic/alpha.wav` -> "alpha"). Hyphens and underscores become spaces.
    """
    for path in audio_files(folder):
        holder = path.parent.name if path.parent != folder else ""
        label = path.stem if label_from == "stem" else holder
        id = path.relative_to(folder).with_suffix("").as_posix()
        yield defaults.file(path, id, re.sub(r"[-_\s]+", " ", label).strip())
