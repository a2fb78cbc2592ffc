"""Corpora of transcribed speech: LibriSpeech and Common Voice.

LibriSpeech's layout: SUBSET/SPEAKER/CHAPTER/*.flac beside one *.trans.txt.

Common Voice: a folder per language, with one TSV a split beside the clips.

    en/train.tsv  en/dev.tsv  en/test.tsv  en/validated.tsv  en/other.tsv  en/invalidated.tsv  en/clips/*.mp3

The TSVs have a header with at least `path` (the clip's name, without suffix in the first releases) and `sentence`;
quotes mean themselves. Known from the readers of lhotse and torchaudio. lhotse's recipe is not used: it opens every
clip once more than needed, requires columns that older releases lack, and skips missing clips silently.
"""

from collections.abc import Iterator
from pathlib import Path

from mowe_ray.data.corpora.layout import Defaults, files_below
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
    transcripts = list(files_below(root, "*.trans.txt"))
    if not transcripts:
        raise ValueError(f"{root}: no *.trans.txt, so this is not LibriSpeech's layout")
    for transcript in transcripts:
        for line in transcript.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            id, _, words = line.strip().partition(" ")
            if id:
                yield defaults.file(transcript.with_name(f"{id}.flac"), id, words.strip().lower())


COMMON_VOICE_SPLITS = ("train", "dev", "test", "validated", "other", "invalidated")


def is_common_voice(path: Path) -> bool:
    """Whether a folder holds clips and tables of one language, or folders that do."""
    return any(
        (clips.parent / f"{split}.tsv").is_file() for clips in _clip_folders(path) for split in COMMON_VOICE_SPLITS
    )


def read_common_voice(folder: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split of one language; sentences keep their case and punctuation.

    Args:
        folder: of the language, such as `cv-corpus-15.0-2023-09-08/en`; or the release, if it has one language only.
        defaults: task and instruction.
        split: one of COMMON_VOICE_SPLITS; `validated` holds train, dev and test and more.

    Raises:
        ValueError: it is not this layout, there are several languages, or no table of the split.
    """
    clip_folders = _clip_folders(folder)
    if len(clip_folders) != 1:
        languages = ", ".join(clips.parent.name for clips in clip_folders) or "none"
        raise ValueError(
            f"{folder}: Common Voice is read one language at a time, and this holds {languages} with clips/"
        )
    table = clip_folders[0].parent / f"{split}.tsv"
    if not table.is_file():
        raise ValueError(f"{folder}: there is no {split}.tsv")
    with table.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        columns = lines.readline().rstrip("\r\n").split("\t")
        for line in lines:
            row = dict(zip(columns, line.rstrip("\r\n").split("\t"), strict=False))
            if name := row.get("path"):
                clip = clip_folders[0] / (name if name.endswith(".mp3") else f"{name}.mp3")
                yield defaults.file(clip, clip.stem, row.get("sentence", ""))


def _clip_folders(path: Path) -> list[Path]:
    return [path / "clips"] if (path / "clips").is_dir() else sorted(path.glob("*/clips"))
