"""Finding one's way in the folder of a corpus, as it lies there after unpacking."""

import csv
from collections.abc import Iterator
from pathlib import Path

from mowe_ray.data.sources.defaults import audio_files


def find(folder: Path, name: str) -> Path | None:
    """Return the file or folder of this name (or `a/b`) in `folder` or up to two levels below, if there is one."""
    for pattern in (name, f"*/{name}", f"*/*/{name}"):
        if found := sorted(folder.glob(pattern)):
            return found[0]
    return None


def need(folder: Path, name: str, corpus: str) -> Path:
    """Like `find`, but ValueError says that `folder` is not laid out as `corpus` is."""
    found = find(folder, name)
    if found is None:
        raise ValueError(f"{folder}: no {name} in it, so this is not {corpus}'s layout")
    return found


def audio_by_stem(folder: Path) -> dict[str, Path]:
    """Every audio file below `folder` by its name without suffix: corpora are converted, but names are kept."""
    return {path.stem: path for path in audio_files(folder)}


def read_csv(file: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV with a header line, where missing cells are empty; ValueError if it lacks one of `columns`."""
    # Some tables hold a few bytes of another encoding, which is no reason to refuse all of them.
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(lines, restval="")
        if missing := set(columns) - set(rows.fieldnames or ()):
            raise ValueError(f"{file}: there is no column {', '.join(sorted(missing))}")
        yield from rows
