"""A folder of audio files: the text of each lies beside it (`a.wav`, `a.txt`), or is the name of its folder."""

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mowe_ray.data.decode import header_duration_s
from mowe_ray.data.sample import bad_audio
from mowe_ray.data.shards.audio_field import has_audio_suffix
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.members import ANSWER_SUFFIXES, INLINE, Part, pack_parts, read, record_of
from mowe_ray.data.shards.record import Row, bad_row, check_record, row_of
from mowe_ray.data.shards.storage import file_system, is_remote, open_file

__all__ = [
    "check_labels",
    "files_below",
    "first_entry",
    "has_audio",
    "has_texts",
    "read",
    "scan",
    "version",
]

_SIDE_SUFFIXES = ("json", *ANSWER_SUFFIXES)
_LABEL = "cls"
_MAY_HOLD_ANSWERS = re.compile(r"\.(?:csv|tsv|jsonl?|parquet|xlsx|arrow|txt|lab|trn|textgrid|srt|xml)$", re.IGNORECASE)
_NOTE = re.compile(r"(?:^|/)(?:readme|licen[cs]e|citation)[^/]*$", re.IGNORECASE)
_SPLITS = {"train", "training", "test", "testing", "eval", "validation", "valid", "val", "dev"}


def files_below(folder: str) -> dict[str, Any]:
    """Return what the file system says of each file below a folder, sorted, by its path; hidden ones are left out.

    Links to folders are followed, each folder once.
    """
    fs, inner = file_system(folder)
    found, waiting, seen = {}, [inner], set()
    while waiting:
        place = waiting.pop()
        real = place if is_remote(folder) else os.path.realpath(place)
        for name, info in fs.find(place, detail=True).items() if real not in seen else ():
            if info.get("islink") and Path(name).is_dir():
                waiting.append(name)
            else:
                found[name] = info
        seen.add(real)
    names = {(fs.unstrip_protocol(name) if is_remote(folder) else name): info for name, info in found.items()}
    below = len(folder.rstrip("/")) + 1
    return {name: names[name] for name in sorted(names) if not f"/{name[below:]}".count("/.")}


def has_audio(names: Sequence[str]) -> bool:
    """Whether any of these files is audio by its suffix."""
    return any(has_audio_suffix(name.rpartition(".")[2]) for name in names)


def version(folder: str) -> str:
    """Return what changes when a file below the folder comes, goes or is written: numbers, bytes and times."""
    infos = files_below(folder).values()
    changes = [str(info.get("mtime") or info.get("LastModified") or info.get("ETag") or "") for info in infos]
    newest = max(changes, default="")
    return f"{len(infos)}-{sum(info.get('size') or 0 for info in infos)}-{newest}"


def first_entry(folder: str) -> dict[str, Any]:
    """Return the first file of each suffix."""
    entry: dict[str, Any] = {}
    for name in files_below(folder):
        entry.setdefault(f".{name.rpartition('.')[2]}", name)
    return entry


def scan(folder: str, reading: Reading, allow_paths: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each audio file below a folder.

    Where no audio file has a text beside it, the names of the folders are the answers: `LABEL/a.wav`.
    """
    files = files_below(folder)
    audio = [name for name in files if has_audio_suffix(name.rpartition(".")[2])]
    texts_of = {name: _texts_of(name, files) for name in audio}
    labelled = not any(texts_of.values())
    for name, texts in texts_of.items():
        yield _row(folder, name, texts, files, reading, labelled=labelled)


def has_texts(files: Mapping[str, Any]) -> bool:
    """Whether most of these audio files have a text beside them."""
    found = [bool(_texts_of(name, files)) for name in files if has_audio([name])]
    return 2 * sum(found) > len(found)


def check_labels(folder: str, files: Mapping[str, Any]) -> None:
    """Raise ValueError where no clip has a text beside it, and the names of folders do not seem to be answers.

    Neither may there be several splits.
    """
    below = len(folder.rstrip("/")) + 1
    splits = sorted({name[below:].partition("/")[0] for name in files if has_audio([name])} & _SPLITS)
    if len(splits) > 1:
        raise ValueError(f"data path {folder!r} holds several splits: name one, as {folder.rstrip('/')}/{splits[0]}")
    if has_texts(files):
        return
    texts = [name for name in files if _MAY_HOLD_ANSWERS.search(name) and not _NOTE.search(name)]
    labels = {posixpath.dirname(name) for name in files if has_audio([name])}
    names = {label.rpartition("/")[2] for label in labels}
    if texts:
        why = f"are the answers in {texts[0]}?"
    elif len(names) == 1 or names <= _SPLITS:
        why = f"every answer would be {' or '.join(map(repr, sorted(names)))}, the name of the folder."
    else:
        return
    raise ValueError(
        f"data path {folder!r} holds audio files without a text beside them (a.wav, a.txt), and {why} "
        "Name a manifest instead, with a row for each clip"
    )


def _texts_of(name: str, files: Mapping[str, Any]) -> dict[str, str]:
    stem = name.rpartition(".")[0]
    named = ((suffix, f"{stem}.{written}") for suffix in _SIDE_SUFFIXES for written in (suffix.upper(), suffix))
    return {suffix: path for suffix, path in named if path in files}


def _row(
    folder: str, name: str, texts: dict[str, str], files: dict[str, Any], reading: Reading, *, labelled: bool
) -> Row:
    relative = name[len(folder.rstrip("/")) + 1 :]
    label = re.sub(r"[-_\s]+", " ", posixpath.dirname(relative).rpartition("/")[2]).strip() if labelled else ""
    try:
        contents = {suffix: _content(path) for suffix, path in texts.items()}
        contents |= {_LABEL: label.encode()} if label else {}
        record = record_of(contents, 1, reading)
        check_record(record, has_audio=True)
        with open_file(name) as file:
            duration = record.duration_s or header_duration_s(file)
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        return bad_row(relative, bad_audio(error))
    parts = [Part(suffix, 0, files[path].get("size") or 0, path) for suffix, path in texts.items()]
    parts += [Part(_LABEL, INLINE, 0, label)] if label else []
    parts.append(Part("audio", 0, files[name].get("size") or 0, name))
    return row_of(record, relative.rpartition(".")[0], duration, reading, clips=1, parts=pack_parts(parts))


def _content(path: str) -> bytes:
    with open_file(path) as file:
        return file.read()
