"""Files by local path or fsspec URL (s3://, gs://, http://...)."""

import errno
import hashlib
import io
import logging
import os
import posixpath
import random
import re
import stat
import time
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import fsspec

from mowe_ray.data.sample import BadAudio, StorageError

# Remote shards are walked from header to header: a megabyte ahead costs less than a request each.
_REMOTE_BLOCK_BYTES = 1 << 20
SHORTER = 416  # HTTP: shorter than was asked for
_ABOUT_A_FILE = (404, 410, SHORTER)  # not found, gone
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_timeout_s: ContextVar[float] = ContextVar("storage_timeout_s", default=300.0)


@contextmanager
def storage_timeout(seconds: float) -> Iterator[None]:
    """Try reads of remote files again, inside, for so long after one has failed (`data.storage_timeout_s`)."""
    before = _timeout_s.set(seconds)
    try:
        yield
    finally:
        _timeout_s.reset(before)


def with_storage_timeout(seconds: float, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call a function within `storage_timeout`; bound to both, it is a function for another process."""
    with storage_timeout(seconds):
        return function(*arguments, **named)


def is_remote(path: str) -> bool:
    """Tell a URL from a local path."""
    return "://" in path


def local_path(path: str) -> str:
    """Drop a `file://` prefix and expand `~`, so that every local file has one spelling."""
    path = path.removeprefix("file://")
    return path if is_remote(path) else os.path.expanduser(path)  # noqa: PTH111 - Path raises if there is no such user


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and the path within it.

    Raises:
        ValueError: no package for this kind of URL is installed, or there is none.
    """
    try:
        if is_remote(url):
            return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
        local = fsspec.filesystem("file")  # `url_to_fs` takes `a::b` for a chain of file systems
        return local, local._strip_protocol(url)
    except ImportError as error:
        package = re.search(r"nstall (\S+)", str(error))  # "Install s3fs to access S3"
        fix = f"pip install {package[1]}" if package else str(error)
        raise ValueError(f"{url!r} needs a package that is not installed: {fix}") from error
    except Exception as error:  # each file system has errors of its own, for credentials or an unknown protocol
        raise ValueError(f"{url!r} cannot be opened: {reason(error)}") from error


@contextmanager
def first_contact(url: str) -> Iterator[None]:
    """Turn what goes wrong when a URL is looked at for the first time into a ValueError that names it."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # aiohttp, botocore and huggingface_hub have errors of their own
        raise ValueError(f"{url!r} cannot be reached: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the last cause of an error: fsspec says "not found" of a server that does not answer."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _remote(url: str) -> Iterator[None]:
    """Keep the errors of a remote file system apart from those of a file that is not there."""
    try:
        yield
    except Exception as error:  # each file system has errors of its own; all are raised
        if isinstance(error, StorageError) or _is_about_a_file(error):
            raise
        raise StorageError(f"{url}: {reason(error)}") from error


def retried(url: str, read: Callable[[], T]) -> T:
    """Return what `read` returns; called again, after growing pauses, while the storage fails.

    Raises:
        StorageError: It has failed for as long as `storage_timeout` says.
    """
    pause_s, deadline = _FIRST_PAUSE_S, None
    while True:
        try:
            with _remote(url):
                return read()
        except StorageError as error:
            deadline = deadline or time.monotonic() + _timeout_s.get()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                tried = f"tried for {_timeout_s.get():g} s (data.storage_timeout_s)"
                raise StorageError(f"{error}; {tried}") from error
            _LOG.warning("%s; trying again for %.0f s", error, left_s)
            # Not in step with the other processes that were refused at the same time.
            time.sleep(min(left_s, pause_s * random.uniform(0.5, 1.0)))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _is_about_a_file(error: BaseException) -> bool:
    status = getattr(error.__cause__ or error, "status", None)
    if status is not None:
        return status in _ABOUT_A_FILE
    # fsspec's HTTP raises FileNotFoundError for anything, from the error of the connection.
    return isinstance(error, FileNotFoundError | IsADirectoryError) and not isinstance(error.__cause__, OSError)


class _RemoteFile(io.RawIOBase):
    """A remote file whose failing connection does not look like a bad sample."""

    def __init__(self, url: str, file: Any) -> None:
        super().__init__()
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        at = self._file.tell()

        def read() -> bytes:
            self._file.seek(at)
            return bytes(self._file.read(len(buffer)))

        content = retried(self._url, read)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_file(path: str) -> BinaryIO:
    """Open a file for reading with seek.

    Raises:
        StorageError: a remote file system fails.
        OSError: there is no such file, or it is a folder, a pipe or a device, on which reading would wait for ever.
    """
    if not is_remote(path):
        local = Path(local_path(path))
        if not local.is_file():
            mode = local.stat().st_mode  # raises if there is nothing
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "not a regular file", path)
        return local.open("rb")
    fs, inner = file_system(path)
    file = retried(path, lambda: fs.open(inner, "rb", block_size=_REMOTE_BLOCK_BYTES))
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(path, file), _REMOTE_BLOCK_BYTES))


@contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Write a file that gets its name when all of it is there, and on a local disk lasts from then on."""
    fs, inner = file_system(path)
    fs.makedirs(fs._parent(inner), exist_ok=True)
    # Of this process alone: two that write the same file do not mix.
    part = f"{inner}.{uuid.uuid4().hex}.part"
    try:
        with fs.open(part, "wb") as file:
            yield file
            if not is_remote(path):
                file.flush()
                os.fsync(file.fileno())
        fs.mv(part, inner)
    except BaseException:  # an interruption, too, leaves no part behind
        with suppress(Exception):  # each file system has errors of its own, and the first one is raised
            fs.rm(part)
        raise


def fingerprint(path: str) -> str:
    """Size and time of change, by which a rewritten file differs from the one that was indexed."""
    if not is_remote(path):
        status = Path(path).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"
    fs, inner = file_system(path)
    return _fingerprint_of(fs.info(inner))


def fingerprints(paths: Sequence[str]) -> list[str]:
    """Return the fingerprint of each file; those of a remote folder come from one listing, as far as that has them."""
    listed: dict[str, Any] = {}
    for folder, number in Counter(posixpath.dirname(path) for path in paths if is_remote(path)).items():
        if number > 1:
            fs, inner = file_system(folder)
            entries = fs.ls(inner, detail=True)
            listed |= {fs.unstrip_protocol(entry["name"]): entry for entry in entries if entry.get("size") is not None}
    return [_fingerprint_of(listed[path]) if path in listed else fingerprint(path) for path in paths]


def _fingerprint_of(info: Mapping[str, Any]) -> str:
    # File systems name it differently; without any, the size alone has to do.
    changed = next(
        (info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if key in info),
        "",
    )
    return f"{info.get('size')}-{changed}"


# A file is identified by so many blocks of it: 16 MiB, which is all of most files but weights.
_BLOCKS, _BLOCK_BYTES = 256, 1 << 16


def content_fingerprint(path: str) -> str:
    """Fingerprint and, for a local file, a hash of its content; of a large file, of blocks all over it.

    Tools that copy keep the time of the last change, and weights of equal shapes have equal sizes.
    """
    if is_remote(path):
        return fingerprint(path)
    digest, size = hashlib.blake2b(digest_size=16), Path(path).stat().st_size
    with Path(path).open("rb") as content:
        for start in range(0, size, max(_BLOCK_BYTES, size // _BLOCKS)):
            content.seek(start)
            digest.update(content.read(_BLOCK_BYTES))
    return f"{fingerprint(path)}-{digest.hexdigest()}"


def file_of_row(source_file: str, name: str, allow_paths: Sequence[str] = ()) -> str:
    """Resolve `name` as written in a row of the file `source_file`: absolute, `~`, a URL, or relative to its folder.

    Rows may be untrusted, and choose what is opened with the rights of this process: only what lies below the
    folder of `source_file` or in `allow_paths`, and, for a local manifest, any local file. Links are followed.

    Args:
        allow_paths: Folders, URLs, and hosts of http(s) URLs.

    Raises:
        BadAudio: The file is none of these.
    """
    path, folder = local_path(name), posixpath.dirname(source_file)
    if not (is_remote(path) or path.startswith("/")):
        path = posixpath.join(folder, path)
    path = path if is_remote(path) else _as_on_disk(path)
    if is_remote(path):
        host = urlsplit(path).hostname if path.startswith(("http://", "https://")) else None
        allowed = not _EVASIVE.search(name) and (host in allow_paths or _is_below(path, folder, *allow_paths))
    elif is_remote(source_file):
        allowed = _is_below(os.path.abspath(path), *allow_paths)  # noqa: PTH100 - `resolve` would follow links
    elif source_file.lower().endswith((".parquet", ".arrow")):
        allowed = _is_below(os.path.abspath(path), os.path.abspath(folder), *allow_paths)  # noqa: PTH100 - as above
    else:
        allowed = True
    if not allowed:
        raise BadAudio(
            "not_allowed", f"data.allow_paths does not cover {name!r}, which is not below its table's folder"
        )
    return path


def _as_on_disk(path: str) -> str:
    """Return the path of a file that is written in another way: as Windows does, with spaces around, in other Unicode.

    A Mac writes an umlaut as two characters (NFD), other systems as one (NFC).
    """
    slashes, narrow = path.replace("\\", "/"), "/".join(map(str.strip, path.split("/")))
    if path.isascii() and path == slashes == narrow:
        return path
    written = (path, slashes, narrow, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))
    return next((one for one in written if os.path.exists(one)), slashes)  # noqa: PTH110 - a name too long is none


# In a URL: the parent folder, one file system within another, and what clients read in different ways.
_EVASIVE = re.compile(r"(?:^|/|%2f)(?:\.|%2e){2}(?:$|/|%2f)|::|[\x00-\x1f\\]", re.IGNORECASE)


def _is_below(path: str, *folders: str) -> bool:
    return any(path == folder or path.startswith(folder.removesuffix("/") + "/") for folder in folders)


def expand(path: str) -> tuple[list[str], bool]:
    """List the files that a folder, glob or file name means, and whether it was one file.

    A path that exists is taken as it is written, whatever brackets, stars or question marks are in it.

    Raises:
        ValueError: nothing is there, or its file system cannot be reached.
    """
    path = local_path(path)
    with first_contact(path):
        fs, inner = file_system(path)
        fs.invalidate_cache()  # of what was there when this process looked before
        if fs.isdir(inner):
            names = [entry["name"] for entry in fs.ls(inner, detail=True) if _is_file(entry)]
        elif _exists(fs, inner):
            if not is_remote(path) and not Path(path).is_file():
                raise ValueError(f"data path {path!r} is neither a file nor a folder")
            return [path], True
        elif any(mark in path for mark in "*?["):
            names = fs.glob(inner) if is_remote(path) else _local_glob(path)
        else:
            raise ValueError(f"data path {path!r} does not exist")
    return sorted(fs.unstrip_protocol(name) if is_remote(path) else name for name in names), False


def _is_file(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a folder is a file, or a link to one, as in the cache of the Hugging Face hub."""
    return entry["type"] == "file" or (bool(entry.get("islink")) and Path(entry["name"]).is_file())


def _exists(fs: Any, inner: str) -> bool:
    """Whether a file is there; unlike `exists`, with the error of a server that cannot be asked."""
    try:
        fs.info(inner)
    except Exception as error:  # each file system has errors of its own
        if not _is_about_a_file(error):
            raise
        return False
    return True


def _local_glob(path: str) -> list[str]:
    """Expand a pattern whose folders may have brackets in their names, as far as they exist as written."""
    pattern = Path(path).absolute()
    folder = next(parent for parent in pattern.parents if parent.is_dir())
    return [str(file) for file in folder.glob(str(pattern.relative_to(folder))) if file.is_file()]
