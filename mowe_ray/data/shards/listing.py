"""Which files are the shards of a path: a file, a folder, a pattern, or a file that lists paths."""

import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from mowe_ray.data.sample import is_about_storage, valid_text
from mowe_ray.data.shards.completion import NOTE, check_complete
from mowe_ray.data.shards.compressed import plain_name
from mowe_ray.data.shards.folder import check_labels, files_below, has_audio
from mowe_ray.data.shards.storage import (
    expand,
    file_of_row,
    file_system,
    first_contact,
    is_remote,
    local_path,
    open_file,
)
from mowe_ray.data.shards.tarred import manifest_of

PACKED = (".tar", ".parquet", ".arrow")  # beside these, JSON files are notes about the corpus
MANIFESTS = (".jsonl", ".ndjson", ".tsv", ".csv", ".json")
SUFFIXES = (*PACKED, *MANIFESTS)
_KINDS = [*((suffix,) for suffix in PACKED), (".jsonl", ".ndjson", ".tsv", ".csv"), (".json",)]
_NOT_READ = re.compile(r"\.(?:parquet|arrow)\.(?:gz|bz2|xz|zst|lz4)$", re.IGNORECASE)
_ARCHIVE = re.compile(r"\.(?:zip|7z|rar)$", re.IGNORECASE)
_METADATA = re.compile(r"^metadata\.(?:csv|jsonl|parquet)$")  # of an audiofolder of `datasets`
# data-00000-of-00004.arrow of save_to_disk, NAME-train.arrow of the cache, train-00000-of-00002.parquet of the hub.
_SPLIT = re.compile(
    r"^(?:.*[-_])?(train|test|validation|valid|val|dev|eval)(?:-\d+(?:-of-\d+)?)?\.[a-z]+$", re.IGNORECASE
)
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_HEAD_BYTES = 4096
_LONGEST_LIST = 100_000  # paths that braces may stand for


def list_shards(paths: str | Sequence[str]) -> list[str]:
    """List the shards of one or several folders (without sub-folders), patterns, files or fsspec URLs, by name.

    A pattern may have braces (`{00000..00127}.tar`); a `.txt` lists paths, one a line, a `.json` of wids URLs.
    A folder of audio files alone is one shard. Hidden files and the `cache-*.arrow` of `datasets` are no shards.

    Raises:
        ValueError: when there is none, a folder mixes formats or splits, `prepare` has not finished it, or it is one
            of `datasets` that has to be written again first.
    """
    given = [paths] if isinstance(paths, str) else list(paths)
    whole = [part for path in given for part in _paths_of(path)]
    if not whole:
        raise ValueError(f"data path {', '.join(map(repr, given))} stands for no file at all")
    known = _listed(whole)
    shards = [shard for path in whole for shard in ([path] if path in known else _shards_of(path))]
    return list(dict.fromkeys(shards))


def is_folder(shard: str) -> bool:
    """Whether a shard is a folder of audio files: its path ends with a slash."""
    return shard.endswith("/")


def exists(path: str) -> bool:
    """Whether there is a file of this path or URL."""
    fs, inner = file_system(path)
    return bool(fs.exists(inner))


def _listed(paths: Sequence[str]) -> set[str]:
    """Return those of many remote tars that a listing of their folder has; asking for each costs a request or two."""
    folders = Counter(posixpath.dirname(path) for path in paths if is_remote(path) and path.endswith(".tar"))
    found: set[str] = set()
    for folder in [folder for folder, number in folders.items() if number > 1]:
        fs, inner = file_system(folder)
        fs.invalidate_cache(inner)
        with suppress(Exception):  # each file system has errors of its own, and some cannot list
            found |= {
                fs.unstrip_protocol(entry["name"]) for entry in fs.ls(inner, detail=True) if entry["type"] == "file"
            }
    return found & set(paths)


def _paths_of(path: str) -> list[str]:
    """Return the paths that one with braces, or a list of paths in a file, stands for."""
    path = local_path(path)
    if path.lower().endswith(".txt"):
        with first_contact(path), open_file(path) as file:
            lines = [line.strip() for line in file.read().decode("utf-8-sig").splitlines()]
        listed = [file_of_row(path, line) for line in lines if line and not line.startswith("#")]
        lost = next((name for name in listed if not (is_remote(name) or _is_glob(name) or exists(name))), None)
        if lost is not None:
            raise ValueError(f"data path {path!r} lists a path a line, and there is no {lost!r}")
        return listed
    if path.lower().endswith(".json") and (urls := _urls_of_wids(path)):
        return [file_of_row(path, url) for url in urls]
    match = _BRACES.search(path)
    # A folder or file of that very name is what is meant.
    if match is None or exists(path[: match.end()] + path[match.end() :].partition("/")[0]):
        return [path]
    return list(_expanded(path))


def _urls_of_wids(path: str) -> list[str]:
    """Return the shards that an index of wids (of webdataset) lists; none of another JSON file."""
    if not exists(path) or is_folder(path):
        return []  # which is told where shards are listed
    with first_contact(path), open_file(path) as file:
        if b'"shardlist"' not in file.read(_HEAD_BYTES):
            return []
        file.seek(0)
        try:
            return [str(shard["url"]) for shard in json.load(file)["shardlist"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"data path {path!r} is a damaged index of wids: {error}") from error


def _expanded(path: str) -> Iterator[str]:
    match = _BRACES.search(path)
    if match is None:
        yield path
        return
    first, dots, last = match[1].partition("..")
    choices: Sequence[str] = match[1].split(",")
    if dots and first.isdecimal() and last.isdecimal():
        numbers = range(int(first), int(last) + 1)
        if len(numbers) > _LONGEST_LIST:
            raise ValueError(f"data path {path!r} stands for {len(numbers)} files, at most {_LONGEST_LIST}")
        choices = [str(number).zfill(len(first)) for number in numbers]
    for choice in choices:
        yield from _expanded(f"{path[: match.start()]}{choice}{path[match.end() :]}")


def _shards_of(path: str) -> list[str]:
    names, single = expand(path)
    if not single:
        _check_prepared(path, names)
    files = names if single else [name for name in names if not _is_ignored(_base(name))]
    named = [name for name in files if _base(name) == "dataset_dict.json"]
    if named:
        splits = ", ".join(f"'{path.rstrip('/')}/{split}'" for split in _read_json(named[0]).get("splits", []))
        raise ValueError(f"data path {path!r} is a DatasetDict: name one of its splits, {splits}")
    tables = [name for name in files if _METADATA.match(_base(name))]
    if tables and not single and not any(_is_of(name, (".tar", ".arrow")) for name in files):
        return tables
    for suffixes in _KINDS:
        shards = [name for name in files if _is_of(name, suffixes)]
        others = {s for s in PACKED for name in files if _is_of(name, (s,))} - set(suffixes)
        if shards and others and suffixes[0] in PACKED:
            raise ValueError(
                f"data path {path!r} holds both {suffixes[0]} and {', '.join(sorted(others))}: "
                f"name one kind, as in '{path.rstrip('/')}/*{suffixes[0]}'"
            )
        if shards:
            if unnamed := [name for name in shards if valid_text(name) != name]:
                raise ValueError(f"data path {path!r} holds {unnamed[0]!r}, whose name is not Unicode: rename it")
            if suffixes == (".arrow",):
                shards = _saved_dataset(path, shards, single)
            if not single:
                _check_folder(path, files, shards)
            # Of a Shar folder only recordings are read, of its other tars nothing.
            with_texts = [] if single else [name for name in shards if manifest_of(name, set(files).__contains__)]
            return with_texts if any(_base(name).startswith("recording.") for name in with_texts) else shards
    return _folder_of_audio(path, files, single)


def _is_of(name: str, suffixes: tuple[str, ...]) -> bool:
    return _NOT_READ.search(name) is None and plain_name(name).lower().endswith(suffixes)


def _folder_of_audio(path: str, files: list[str], single: bool) -> list[str]:
    """Return a folder of audio files, with or without folders in it, as one shard."""
    below: list[str] = []
    if not single and not _is_glob(path):
        found = files_below(path)
        below = [name for name in found if not _is_ignored(_base(name))]
        inner = {name[: name.rindex("/")] for name in below if _is_of(name, PACKED) or _METADATA.match(_base(name))}
        if inner:
            some = ", ".join(f"'{folder}'" for folder in sorted(inner)[:4])
            raise ValueError(f"data path {path!r} holds no shard itself, but folders in it do: name them, as {some}")
        if has_audio(below):
            check_labels(path, found)
            return [f"{local_path(path).rstrip('/')}/"]
    if has_audio(files):
        raise ValueError(
            f"data path {path!r} is audio alone: name the folder of the files, or a manifest with their texts"
        )
    packed = [name for name in files if _NOT_READ.search(name) or _ARCHIVE.search(name)]
    hint = f"; {_base(packed[0])} has to be unpacked first" if packed else ""
    what = "is" if single else f"holds {len(below or files)} files,"
    raise ValueError(f"data path {path!r} {what} none of {', '.join(SUFFIXES)}, and no folder of audio files{hint}")


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _is_ignored(base: str) -> bool:
    return base.startswith(".") or base == NOTE or (base.startswith("cache-") and base.endswith(".arrow"))


def _check_prepared(path: str, names: list[str]) -> None:
    """Raise ValueError where `prepare` has not finished a folder, or one that is not a pattern lacks shards."""
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in names):
        if f"{folder}/{NOTE}" in names:
            check_complete(folder, names)
        elif _is_glob(path):
            check_complete(folder, None)


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _saved_dataset(path: str, shards: list[str], single: bool) -> list[str]:
    """Return those shards that the state.json beside them lists, which `save_to_disk` writes."""
    kept = []
    for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards):
        in_folder = [shard for shard in shards if shard.rpartition("/")[0] == folder]
        try:
            state = _read_json(f"{folder}/state.json" if folder else "state.json")
        except FileNotFoundError:
            kept += in_folder
            continue
        if state.get("_indices_data_files"):
            raise ValueError(
                f"data path {path!r} is a selection or shuffle of a dataset, whose rows are listed apart from its "
                "data: call flatten_indices() before save_to_disk()"
            )
        listed = {str(file.get("filename")) for file in state.get("_data_files") or []}
        missing = listed - {_base(shard) for shard in in_folder}
        if missing and not single and not _is_glob(path):
            raise ValueError(f"data path {path!r} lacks {', '.join(sorted(missing))}, which its state.json names")
        kept += [shard for shard in in_folder if single or _base(shard) in listed or not listed]
    return kept


def _check_folder(path: str, files: list[str], shards: list[str]) -> None:
    """Raise ValueError where a folder holds several splits, or shards that would be passed over."""
    folder = path.rstrip("/")
    packed = [_base(name) for name in files if _NOT_READ.search(name)]
    if packed:
        raise ValueError(
            f"data path {path!r} holds {packed[0]}, which has to be unpacked first; "
            f"to leave it out, name the others, as in '{folder}/*.{shards[0].rpartition('.')[2]}'"
        )
    splits = {match[1].lower() for name in shards if (match := _SPLIT.match(_base(name)))}
    if len(splits) > 1 and not _is_glob(path):
        suffix = shards[0].rpartition(".")[2]
        raise ValueError(
            f"data path {path!r} holds several splits, {', '.join(sorted(splits))}: "
            f"name one, as in '{folder}/*{sorted(splits)[0]}*.{suffix}', or all, as in '{folder}/*.{suffix}'"
        )


def _read_json(path: str) -> dict[str, Any]:
    """Return the content of a file that `datasets` writes; ValueError names it if it cannot be read."""
    try:
        with open_file(path) as file:
            content = json.load(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if is_about_storage(error):
            raise
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content
