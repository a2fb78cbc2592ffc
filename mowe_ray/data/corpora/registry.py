"""Every layout that can be read, and which one a source has, found by looking at it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mowe_ray.data.corpora.captions import (
    AUDIOCAPS_SPLITS,
    WAVCAPS_SOURCES,
    is_audiocaps,
    is_wavcaps,
    read_audiocaps,
    read_wavcaps,
)
from mowe_ray.data.corpora.emotion import (
    IEMOCAP_SESSIONS,
    MELD_LABELS,
    MELD_SPLITS,
    is_iemocap,
    is_meld,
    read_iemocap,
    read_meld,
)
from mowe_ray.data.corpora.layout import Defaults, audio_files, files_below
from mowe_ray.data.corpora.manifest_and_folders import (
    LABELS,
    SUFFIXES,
    is_audiofolder,
    is_sharded,
    read_audiofolder,
    read_labelled_folders,
    read_manifest,
    read_sharded,
)
from mowe_ray.data.corpora.parquet import is_audiobench, parquet_files, read_audiobench, read_parquet
from mowe_ray.data.corpora.question_answering import (
    CLOTHO_AQA_SPLITS,
    SLUE_SQA5_SPLITS,
    SPOKEN_SQUAD_SPLITS,
    is_clotho_aqa,
    is_multiple_choice,
    is_slue_sqa5,
    is_spoken_squad,
    read_clotho_aqa,
    read_multiple_choice,
    read_slue_sqa5,
    read_spoken_squad,
)
from mowe_ray.data.corpora.speech import COMMON_VOICE_SPLITS, is_common_voice, read_common_voice, read_librispeech
from mowe_ray.data.sample import BadSample, Sample


@dataclass(frozen=True, slots=True)
class Kind:
    """A layout that can be read.

    Attributes:
        about: description for users, in a line.
        is_it: whether a path seems to be of this kind.
        read: makes the samples of a path and the defaults of its rows, then of the split if the kind has `splits`
            (None = all), then of the label if it has `labels`.
        task: its task, if the layout determines one.
        splits: official names; () = any, None = there are no splits.
        whole: whether all splits may be read together; not where one of them is for testing.
        labels: fields that may be used as the answer; the first is the default.
    """

    about: str
    is_it: Callable[[Path], bool]
    read: Callable[..., Iterator[Sample | BadSample]]
    task: str | None = None
    splits: tuple[str, ...] | None = ()
    whole: bool = True
    labels: tuple[str, ...] = ()


def _parquet(is_it: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """Whether the first Parquet file of a path is of a kind."""

    def first_is(path: Path) -> bool:
        has_some = path.suffix == ".parquet" or next(files_below(path, "*.parquet"), None) is not None
        try:
            return has_some and is_it(parquet_files(path)[0])
        except pa.ArrowException:  # a broken file, which reading counts
            return False

    return first_is


# The first that fits is taken: the particular before the general, and a glance before a walk through all files.
KINDS: dict[str, Kind] = {
    "mcq": Kind(
        "JSON, JSON lines or Parquet of MMAU, MMAU-Pro (its closed questions), MMAR or MMSU, beside its clips",
        is_multiple_choice,
        read_multiple_choice,
        splits=None,
    ),
    "manifest": Kind(
        "JSON (lines), CSV or TSV: audio_filepath|audio|path, text|answer, and where they differ from row to row\n"
        "instruction, task, id, duration, offset",
        lambda path: path.suffix in SUFFIXES and path.is_file(),
        read_manifest,
        splits=None,
    ),
    "common-voice": Kind(
        "folder of one language, TSVs beside clips/",
        is_common_voice,
        read_common_voice,
        "asr",
        COMMON_VOICE_SPLITS,
        whole=False,
    ),
    "audiocaps": Kind(
        "its CSVs, and the clips that were still to be had",
        is_audiocaps,
        read_audiocaps,
        "ac",
        AUDIOCAPS_SPLITS,
        whole=False,
    ),
    "wavcaps": Kind("json_files/, and the unpacked Zip_files/", is_wavcaps, read_wavcaps, "ac", WAVCAPS_SOURCES),
    "clotho-aqa": Kind(
        "its CSVs, and audio_files/",
        is_clotho_aqa,
        read_clotho_aqa,
        "aqa",
        CLOTHO_AQA_SPLITS,
        whole=False,
    ),
    "iemocap": Kind("Session1/ to Session5/", is_iemocap, read_iemocap, "er", IEMOCAP_SESSIONS),
    "meld": Kind(
        "its CSVs, and the folders of clips",
        is_meld,
        read_meld,
        "er",
        MELD_SPLITS,
        whole=False,
        labels=tuple(MELD_LABELS),
    ),
    "spoken-squad": Kind(
        "its JSON files, train_wav/ and dev_wav/",
        is_spoken_squad,
        read_spoken_squad,
        "sqa",
        SPOKEN_SQUAD_SPLITS,
        whole=False,
    ),
    "audiofolder": Kind(
        "audio files and metadata.csv|jsonl|parquet, as Hugging Face's datasets read them",
        is_audiofolder,
        read_audiofolder,
    ),
    "audiobench": Kind("Parquet with context, instruction and answer", _parquet(is_audiobench), read_audiobench),
    "slue-sqa5": Kind(
        "Parquet of SLUE phase 2",
        _parquet(is_slue_sqa5),
        read_slue_sqa5,
        "sqa",
        SLUE_SQA5_SPLITS,
        whole=False,
    ),
    "parquet": Kind(
        "Parquet file or folder with an audio column, as Hugging Face's datasets write it",
        _parquet(lambda file: True),
        read_parquet,
    ),
    "librispeech": Kind(
        "folders with *.trans.txt beside FLAC files",
        lambda path: next(files_below(path, "*.trans.txt"), None) is not None,
        read_librispeech,
        "asr",
    ),
    "shards": Kind(
        "what training reads as it is: WebDataset tars (NeMo, Shar), saved datasets, clips with a .txt beside each",
        is_sharded,
        read_sharded,
        splits=None,
    ),
    "folders": Kind(
        "LABEL/*.wav, or files named by the words spoken",
        lambda path: next(audio_files(path), None) is not None,
        read_labelled_folders,
        splits=None,
        labels=LABELS,
    ),
}


_Read = Callable[..., Iterator[Sample | BadSample]]


def register_corpus(name: str, about: str, is_it: Callable[[Path], bool], **options: Any) -> Callable[[_Read], _Read]:
    """Return a decorator that enters the reader of a layout, to be tried before all that are known.

    Args:
        name: Its name for `--kind`.
        about: As in `Kind`, with `is_it` and, in `options`, its other attributes.

    Raises:
        ValueError: There is another of this name.
    """

    def enter(read: _Read) -> _Read:
        known = KINDS.get(name)
        if known is not None and known.read.__module__ != read.__module__:
            raise ValueError(f"{name!r} is a kind of source already, of {known.read.__module__}; choose another name")
        others = {other: kind for other, kind in KINDS.items() if other != name}
        KINDS.clear()
        KINDS.update({name: Kind(about, is_it, read, **options), **others})
        return read

    return enter


def detect_kind(path: Path) -> str:
    """Tell the kind of a source by its files.

    Raises:
        ValueError: it does not exist, or nothing known is in it.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    for name, kind in KINDS.items():
        if kind.is_it(path):
            return name
    raise ValueError(
        f"{path}: neither a manifest ({', '.join(SUFFIXES)}), nor a folder with Parquet, audio files "
        "or a corpus in it; --help lists the kinds of source"
    )


def check_source(path: Path, name: str, split: str | None, label: str | None) -> None:
    """Raise ValueError where a path, split or label cannot be of the kind called `name`; opens no file."""
    kind = KINDS[name]
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if name in ("manifest", "folders") and path.is_dir() != (name == "folders"):
        raise ValueError(f"{path}: not of kind {name!r}")
    if kind.splits is None and split is not None:
        raise ValueError(f"--split {split}: a source of kind {name!r} has no splits")
    if split is None and not kind.whole:
        raise ValueError(f"--split is needed, for {name} has a part for testing: {', '.join(kind.splits or ())}")
    if kind.splits and split is not None and split not in kind.splits:
        raise ValueError(f"--split {split}: {name} has {', '.join(kind.splits)}")
    if label is not None and label not in kind.labels:
        known = " or ".join(kind.labels) or "not for it"
        raise ValueError(f"--label-from {label}: with kind {name} it is {known}")


def read_source(
    path: Path, name: str, defaults: Defaults, split: str | None = None, label: str | None = None
) -> Iterator[Sample | BadSample]:
    """Read a source that `check_source` let pass, always in the same order.

    Args:
        path: file or folder.
        name: of its kind.
        defaults: values for fields that its rows lack.
        split: the part of it to read; None = all.
        label: what to take for the answer, for kinds with a choice; None = the usual.

    Raises:
        ValueError: the path is not of this kind, or lacks the split.
    """
    kind = KINDS[name]
    arguments = [] if kind.splits is None else [split]
    if kind.labels:
        arguments.append(label or kind.labels[0])
    return kind.read(path, defaults, *arguments)


def count_samples(path: Path, name: str, split: str | None = None) -> int | None:
    """Estimate the number of samples from a quick look; None if that is not possible."""
    if name in ("parquet", "audiobench", "slue-sqa5"):
        try:
            counts: list[int] = [pq.read_metadata(f).num_rows for f in parquet_files(path, split)]
        except (pa.ArrowException, OSError):  # a broken file, which reading counts
            return None
        return sum(counts)
    if name == "manifest":
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
        return lines if path.suffix != ".json" else None
    if name in ("librispeech", "folders", "audiofolder"):
        return sum(1 for _ in audio_files(path / split if split else path))
    return None
