"""Manifests, one row a clip, as JSON, CSV or TSV; shards that training reads directly; and folders of audio files.

Folders of audio files come with a table (the audiofolder layout of `datasets`), or are named after the sounds in them.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.corpora.layout import Defaults, audio_files, files_below, read_csv
from mowe_ray.data.corpora.parquet import read_rows
from mowe_ray.data.sample import BadAudio, BadSample, Sample
from mowe_ray.data.shards import PACKED, list_shards, read_samples, scan_shard, with_options
from mowe_ray.data.shards.compressed import plain_name
from mowe_ray.data.shards.folder import files_below as files_below_of
from mowe_ray.data.shards.folder import has_texts
from mowe_ray.data.shards.listing import is_folder
from mowe_ray.data.shards.manifest import manifest_entries, manifest_header, parse_entry

SUFFIXES = (".jsonl", ".ndjson", ".json", ".tsv", ".csv")
_SAMPLES_AT_A_TIME = 16  # of a shard, with their encoded audio


def read_manifest(manifest: Path, defaults: Defaults) -> Iterator[Sample | BadSample]:
    """Read the clips that a manifest names.

    Fields go by their usual names, among them NeMo's `audio_filepath`, `text`, `duration` and
    `offset`. Relative audio paths start at the manifest's folder.
    """
    for number, row in enumerate(manifest_rows(manifest), start=1):
        id = f"{manifest.stem}-{number:06d}"
        if isinstance(row, BadAudio):
            yield BadSample(id, defaults.source, row.cause, row.detail)
        else:
            yield defaults.sample(row, id, manifest)


def is_sharded(path: Path) -> bool:
    """Whether training reads a path as it is: shards, or a folder of clips with a text beside each."""
    try:
        first = list_shards(str(path))[0]
    except ValueError:
        return False
    return has_texts(files_below_of(first)) if is_folder(first) else plain_name(first).lower().endswith(PACKED)


def read_sharded(path: Path, defaults: Defaults) -> Iterator[Sample | BadSample]:
    """Read what training reads directly, by its own reader: tars, saved datasets, cuts, clips and texts.

    Raises:
        ValueError: nothing says the task of a sample, or what to ask about it.
    """
    given = () if defaults.instruction is None else (defaults.instruction,)
    reading = replace(defaults.reading, task=defaults.task, instructions=given)
    for shard in list_shards(str(path)):
        rows = scan_shard(shard, reading, defaults.allow_paths)
        for start in range(0, len(rows), _SAMPLES_AT_A_TIME):
            part = rows.slice(start, _SAMPLES_AT_A_TIME)
            bad = [row for row in part.to_pylist() if row["cause"]]
            yield from (BadSample(row["id"], defaults.source, row["cause"], row["detail"]) for row in bad)
            good = part.filter(pc.is_null(part["cause"]))
            for column, value in (("shard", shard), ("source", defaults.source)):
                good = good.append_column(column, pa.array([value] * len(good), pa.string()))
            for sample in read_samples(with_options(good, defaults.allow_paths, {defaults.source: reading})):
                yield sample if isinstance(sample, BadSample) else defaults.asked(sample)


def manifest_rows(manifest: Path) -> Iterator[dict[str, Any] | BadAudio]:
    """Yield the fields of each row, or what is wrong with it."""
    columns = manifest_header(str(manifest))
    try:
        for _, entry in manifest_entries(str(manifest)):
            try:
                yield parse_entry(entry, columns)
            except BadAudio as error:
                yield error
    except BadAudio as error:  # of the list as a whole
        yield error


_FILE_NAME = "file_name"
_PROBLEM = "what is wrong with a row"
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def metadata_files(folder: Path) -> list[Path]:
    """List the tables of an audiofolder: metadata.csv, .jsonl or .parquet at any depth, one to a folder."""
    return [file for file in files_below(folder, "metadata.*") if file.suffix in (".csv", ".jsonl", ".parquet")]


def is_audiofolder(folder: Path) -> bool:
    """Whether a folder holds audio files and a table of them."""
    return folder.is_dir() and bool(metadata_files(folder)) and next(audio_files(folder), None) is not None


def read_audiofolder(folder: Path, defaults: Defaults, split: str | None = None) -> Iterator[Sample | BadSample]:
    """Read an audiofolder: https://huggingface.co/docs/datasets/audio_dataset#audiofolder.

    Audio files that no row names are counted as having no answer.

    Args:
        folder: Has metadata.csv, .jsonl or .parquet in it or below, whose column `file_name` is relative to the table.
        defaults: Values for fields that rows lack.
        split: Only files below a folder of this name; None takes all where there are not several splits.

    Raises:
        ValueError: A table lacks `file_name`, there is no file of the split, or the split is not said.
    """
    audio = [path for path in audio_files(folder) if split is None or split in path.relative_to(folder).parts[:-1]]
    splits = sorted(
        {_SPLITS[part] for path in audio for part in path.relative_to(folder).parts[:-1] if part in _SPLITS}
    )
    if split is None and len(splits) > 1:
        raise ValueError(f"--split is needed, for {folder} has {', '.join(splits)}")
    if not audio:
        raise ValueError(f"{folder}: no audio file" + (f" of split {split!r}" if split else ""))
    wanted, named = set(audio), set()
    for table in metadata_files(folder):
        for number, row in enumerate(_metadata_rows(table), start=1):
            name = next((str(row[key]) for key in row if key.endswith(_FILE_NAME) and row[key]), None)
            if name is None:
                if number == 1:
                    raise ValueError(
                        f"{table}: the first row has no {_FILE_NAME}, so this is not the audiofolder layout: make the "
                        "columns file_name and transcription, or a manifest"
                    )
                problem = str(row.get(_PROBLEM, f"no {_FILE_NAME}"))
                yield BadSample(f"{table.name}:{number}", defaults.source, "unreadable", problem)
                continue
            path = Path(os.path.normpath(table.parent / name))
            if path in wanted or (not path.exists() and (split is None or split in path.relative_to(folder).parts)):
                named.add(path)
                id = path.relative_to(folder).with_suffix("").as_posix()
                yield defaults.sample({"id": id, **row, "audio": str(path.absolute())}, id, table)
    for path in sorted(wanted - named):
        yield BadSample(str(path.relative_to(folder)), defaults.source, "no_answer", "no row of metadata.* names it")


def _metadata_rows(table: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table; one that cannot be read has only what is wrong with it."""
    if table.suffix == ".csv":
        rows = list(read_csv(table))
        yield from rows or [{}]  # a header without rows: no table with a header
    elif table.suffix == ".parquet":
        yield from read_rows(table)
    else:
        for row in manifest_rows(table):
            yield {_PROBLEM: row.detail} if isinstance(row, BadAudio) else row


LABELS = ("folder", "stem")


def check_labels(folder: Path) -> None:
    """Raise ValueError where the names of the folders of audio files do not seem to be their answers."""
    audio = list(audio_files(folder))
    stems = {path.with_suffix("") for path in audio}
    tables = [path for path in files_below(folder, "*") if _may_hold_answers(path, stems)]
    labels = {path.parent.name for path in audio if path.parent != folder}
    choice = "make a manifest of them, or pass --kind folders to take the names of the folders for the answers"
    splits = sorted({path.relative_to(folder).parts[0] for path in audio} & _SPLITS.keys())
    if len(splits) > 1:
        raise ValueError(f"{folder} has {', '.join(splits)}: name one of them, as in {folder / splits[0]}")
    if tables:
        raise ValueError(f"{folder}: are the answers in {tables[0].relative_to(folder)}? If so, {choice}")
    if len(labels) == 1 or (labels and labels <= _SPLITS.keys()):
        names = " or ".join(sorted(repr(label) for label in labels))
        raise ValueError(f"{folder}: every answer would be {names}, the name of the folder: {choice}")


def _may_hold_answers(path: Path, stems: set[Path]) -> bool:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx", ".arrow"):
        return True
    if suffix not in (".txt", ".lab", ".trn", ".textgrid", ".srt"):
        return False
    with path.open(encoding="utf-8", errors="replace") as lines:
        first, *words = re.split(r"[\s,;|]+", lines.readline().strip(), maxsplit=1)
    # A transcript beside its clip, or a list of clips with a text each (not one of clips alone, as in Speech Commands).
    return path.with_suffix("") in stems or (bool(words) and Path(first).stem in {stem.name for stem in stems})


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
