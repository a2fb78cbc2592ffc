"""LibriSpeech's layout: SUBSET/SPEAKER/CHAPTER/*.flac beside one *.trans.txt."""

from collections.abc import Iterator
from pathlib import Path

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.sample import BadSample, Sample


def read_librispeech(folder: Path, defaults: Defaults, subset: str | None = None) -> Iterator[Sample | BadSample]:
    """Read every chapter below `folder`; the FLAC files are kept as they are.

    The transcripts are all capitals. Lower case suits language models better; scoring ignores case.

    Args:
        folder: the corpus or any part of it.
        defaults: task and instruction.
        subset: only this sub-folder, such as `train-clean-100`; None = all.

    Raises:
        ValueError: there is no transcript.
    """
    root = folder / subset if subset else folder
    transcripts = sorted(root.rglob("*.trans.txt"))
    if not transcripts:
        raise ValueError(f"{root}: no *.trans.txt, so this is not LibriSpeech's layout")
    for transcript in transcripts:
        for line in transcript.read_text(encoding="utf-8").splitlines():
            id, _, words = line.strip().partition(" ")
            if id:
                yield defaults.file(transcript.with_name(f"{id}.flac"), id, words.strip().lower())
