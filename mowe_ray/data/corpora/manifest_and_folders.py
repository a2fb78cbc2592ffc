"""Manifests: one row a clip, as JSON lines, a JSON list, or TSV with a header line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mowe_ray.data.corpora.layout import Defaults, audio_files
from mowe_ray.data.sample import BadSample, Sample

SUFFIXES = (".jsonl", ".json", ".tsv")


def read_manifest(manifest: Path, defaults: Defaults) -> Iterator[Sample | BadSample]:
    """Read the clips that a manifest names.

    Fields go by their usual names, among them NeMo's `audio_filepath`, `text`, `duration` and
    `offset`. Relative audio paths start at the manifest's folder.
    """
    for number, row in enumerate(_rows(manifest), start=1):
        id = f"{manifest.stem}-{number:06d}"
        if isinstance(row, dict):
            yield defaults.sample(row, id, manifest)
        else:
            yield BadSample(id, defaults.source, "unreadable", row)


def _rows(manifest: Path) -> Iterator[dict[str, Any] | str]:
    """Fields of each row, or what is wrong with it."""
    with manifest.open(encoding="utf-8-sig") as file:
        if manifest.suffix == ".tsv":
            columns = file.readline().rstrip("\r\n").split("\t")
            for line in file:
                if line.strip():
                    yield dict(zip(columns, line.rstrip("\r\n").split("\t"), strict=False))
            return
        if file.read(1) == "[":
            yield from map(_checked, json.loads("[" + file.read()))
            return
        file.seek(0)
        for line in file:
            if line.strip():
                try:
                    yield _checked(json.loads(line))
                except json.JSONDecodeError as error:
                    yield f"not JSON: {error}"


def _checked(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"not a JSON object: {str(value)[:60]}"


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
