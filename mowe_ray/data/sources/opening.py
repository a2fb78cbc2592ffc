"""Which reader a source needs, found by looking at it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import pyarrow.parquet as pq

from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.sources.audiobench import is_audiobench, read_audiobench
from mowe_ray.data.sources.defaults import Defaults, audio_files
from mowe_ray.data.sources.hf_parquet import parquet_files, read_parquet
from mowe_ray.data.sources.labelled_folders import LabelFrom, read_labelled_folders
from mowe_ray.data.sources.librispeech import read_librispeech
from mowe_ray.data.sources.manifest import SUFFIXES, read_manifest

Kind = Literal["manifest", "parquet", "librispeech", "audiobench", "folders"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def detect_kind(path: Path) -> Kind:
    """Tell the kind of a source by its files.

    Raises:
        ValueError: it does not exist, or nothing known is in it.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix in SUFFIXES and path.is_file():
        return "manifest"
    if path.suffix == ".parquet" or next(path.rglob("*.parquet"), None):
        return "audiobench" if is_audiobench(parquet_files(path)[0]) else "parquet"
    if next(path.rglob("*.trans.txt"), None):
        return "librispeech"
    if next(audio_files(path), None):
        return "folders"
    raise ValueError(
        f"{path}: neither a manifest ({', '.join(SUFFIXES)}), nor a folder with Parquet, "
        "LibriSpeech transcripts or audio files in it"
    )


def read_source(
    path: Path,
    kind: Kind,
    defaults: Defaults,
    split: str | None = None,
    label_from: LabelFrom = "folder",
) -> Iterator[Sample | BadSample]:
    """Read a source, always in the same order.

    Args:
        path: file or folder.
        kind: how it is laid out.
        defaults: what its rows do not say themselves.
        split: the part of it to read, for kinds that have parts; None = all.
        label_from: for labelled folders, which name is the answer.

    Raises:
        ValueError: the kind has no parts, or the path is not of this kind.
    """
    if kind == "librispeech":
        return read_librispeech(path, defaults, split)
    if kind == "audiobench":
        return read_audiobench(path, defaults, split)
    if kind == "parquet":
        return read_parquet(path, defaults, split)
    if split is not None:
        raise ValueError(f"--split {split}: a source of kind {kind!r} has no splits")
    if path.is_dir() != (kind == "folders"):
        raise ValueError(f"{path}: not of kind {kind!r}")
    if kind == "folders":
        return read_labelled_folders(path, defaults, label_from)
    return read_manifest(path, defaults)


def count_samples(path: Path, kind: Kind, split: str | None = None) -> int | None:
    """How many samples to expect, as far as a quick look tells; None if it does not."""
    if kind in ("parquet", "audiobench"):
        counts: list[int] = [pq.read_metadata(f).num_rows for f in parquet_files(path, split)]
        return sum(counts)
    if kind == "manifest":
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
        return lines if path.suffix != ".json" else None
    return sum(1 for _ in audio_files(path / split if split else path))
