"""Files by local path or fsspec URL (s3://, gs://, http://...)."""

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

# Remote shards are walked from header to header: a megabyte ahead costs less than a request each.
_REMOTE_BLOCK_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Tell a URL from a local path."""
    return "://" in path


def local_path(path: str) -> str:
    """Drop a `file://` prefix, so that every local file has one spelling."""
    return path.removeprefix("file://")


def open_file(path: str) -> BinaryIO:
    """Open a file for reading with seek."""
    if not is_remote(path):
        return Path(path).open("rb")
    fs, inner = fsspec.core.url_to_fs(path)
    return cast(BinaryIO, fs.open(inner, "rb", block_size=_REMOTE_BLOCK_BYTES))


def fingerprint(path: str) -> str:
    """Size and time of change, which tell a rewritten file from the one that was indexed."""
    if not is_remote(path):
        stat = Path(path).stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    fs, inner = fsspec.core.url_to_fs(path)
    info = fs.info(inner)
    changed = next(
        (info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if key in info),
        "",
    )
    return f"{info.get('size')}-{changed}"


def sibling(path: str, name: str) -> str:
    """Resolve `name` as written in the file `path`: absolute, a URL, or relative to its folder."""
    if is_remote(name) or name.startswith("/"):
        return local_path(name)
    return posixpath.join(posixpath.dirname(path), name)


def expand(path: str) -> tuple[list[str], bool]:
    """List the files that a folder, glob or file name means, and whether it was one file."""
    path = local_path(path)
    fs, inner = fsspec.core.url_to_fs(path)
    if any(mark in path for mark in "*?["):
        found = fs.glob(inner)
    elif fs.isdir(inner):
        found = [entry["name"] for entry in fs.ls(inner, detail=True) if entry["type"] == "file"]
    elif fs.exists(inner):
        return [path], True
    else:
        raise ValueError(f"data path {path!r} does not exist")
    return sorted(fs.unstrip_protocol(name) if is_remote(path) else name for name in found), False


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes | OSError]:
    """Yield the bytes of each (path, offset, size), or why there are none.

    Local ranges are read one by one as they are taken; remote ones at once, in concurrent requests.
    """
    remote = iter(_read_remote([part for part in ranges if is_remote(part[0])]))
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for path, at, size in ranges:
            if is_remote(path):
                yield next(remote)
                continue
            try:
                if path not in files:
                    files[path] = stack.enter_context(Path(path).open("rb", buffering=0))
                files[path].seek(at)
                content: bytes | OSError = files[path].read(size)
            except OSError as error:
                content = error
            yield content


def _read_remote(ranges: Sequence[tuple[str, int, int]]) -> list[bytes | OSError]:
    if not ranges:
        return []
    fs, _ = fsspec.core.url_to_fs(ranges[0][0])  # the shards of one source share a file system
    ends = [at + size for _, at, size in ranges]
    found = fs.cat_ranges([path for path, _, _ in ranges], [at for _, at, _ in ranges], ends, on_error="return")
    return [part if isinstance(part, bytes) else OSError(str(part)) for part in found]
