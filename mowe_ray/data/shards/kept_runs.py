"""Runs of remote shards: neighbouring samples that are fetched by one request, and kept on a node's disk meanwhile.

The samples of a run are trained in many micro-batches of one lane, which tasks in several processes read. The first
that needs one of them fetches the run; the others find it in a folder, until newer runs need the room.
"""

import fcntl
import hashlib
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from pathlib import Path
from stat import S_ISDIR
from typing import Any, NamedTuple, Self, TypeVar

from mowe_ray.data.sample import StorageError
from mowe_ray.data.shards.storage import file_system, retried

T = TypeVar("T")

_AT_A_TIME = 4  # requests of a process: its memory has as many runs
_LOCKS = 256
_UNUSED_S = 3600.0  # from then on a folder is one that a killed run has left
_SPARE_BYTES = 1 << 30  # that stay free on the disk


class Extent(NamedTuple):
    """The bytes of a run: from `start` to `stop` of a shard, of the version that was indexed."""

    path: str
    start: int
    stop: int
    version: str


class KeptRuns:
    """The runs that a task reads, fetched ahead in threads, in the order in which it needs them.

    What cannot be kept, because the disk is full or the shard is another by now, is read sample by sample as ever.
    """

    def __init__(self, key: str, room: int, extents: Iterable[Extent]) -> None:
        """Begin to fetch.

        Args:
            key: of those who share what is kept.
            room: bytes that are kept; more than are used alternately, or they are fetched again and again.
            extents: no two of which overlap.
        """
        self._folder, self._room = folder_of(key), room
        self._files: dict[Extent, Future[Path | None]] = {extent: Future() for extent in extents}
        self._of_path: dict[str, list[Extent]] = {}
        for extent in self._files:
            self._of_path.setdefault(extent.path, []).append(extent)
        self._left: queue.SimpleQueue[Extent] = queue.SimpleQueue()
        for extent in self._files:
            self._left.put(extent)

    def __enter__(self) -> Self:
        for _ in range(min(_AT_A_TIME, len(self._files))):
            # A daemon: the process does not wait for its request. In this context, which has the storage's timeout.
            threading.Thread(target=copy_context().run, args=(self._fetch_all,), daemon=True, name="runs").start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(queue.Empty):
            while True:
                self._left.get_nowait()

    def read(self, path: str, at: int, size: int) -> bytes | None:
        """Return a range of bytes; None if it is in no run that is kept.

        Raises:
            StorageError: its run cannot be fetched.
        """
        extent = next((e for e in self._of_path.get(path, ()) if e.start <= at and at + size <= e.stop), None)
        file = None if extent is None else self._files[extent].result()
        if extent is None or file is None:
            return None
        try:
            with file.open("rb", buffering=0) as kept:
                return os.pread(kept.fileno(), size, at - extent.start)
        except FileNotFoundError:  # others needed its room
            return None

    def _fetch_all(self) -> None:
        with suppress(queue.Empty):
            while True:
                extent = self._left.get_nowait()
                try:
                    self._files[extent].set_result(self._fetched(extent))
                except StorageError as error:
                    self._files[extent].set_exception(error)
                except Exception:  # noqa: BLE001 - reading the samples one by one finds out what it is
                    self._files[extent].set_result(None)

    def _fetched(self, extent: Extent) -> Path | None:
        """Return the file of a run, which is fetched by one process alone."""
        name = hashlib.blake2b(repr(extent).encode(), digest_size=16).hexdigest()
        file = self._folder / f"{name}.run"
        if not self._folder.exists():
            _own(self._folder.parent)
            _remove_unused(self._folder.parent)
            self._folder.mkdir(mode=0o700, exist_ok=True)
        with self._lock(str(int(name, 16) % _LOCKS)):
            if file.exists():
                os.utime(file)
                return file
            fs, inner = file_system(extent.path)
            content = retried(extent.path, lambda: fs.cat_file(inner, start=extent.start, end=extent.stop))
            if len(content) != extent.stop - extent.start:
                return None
            with self._lock("room"):
                if not self._make_room(len(content)):
                    return None
                part = file.with_suffix(".part")
                part.write_bytes(content)
                return part.replace(file)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> bool:
        """Remove the runs that nobody has asked for the longest; returns whether there is room."""
        kept = sorted(_sizes(self._folder))
        total = size + sum(length for _, length, _ in kept)
        for _, length, file in kept:
            if total <= self._room:
                break
            file.unlink(missing_ok=True)
            total -= length
        return shutil.disk_usage(self._folder).free - size > _SPARE_BYTES


_runs: ContextVar[KeptRuns | None] = ContextVar("runs", default=None)


def with_runs(runs: KeptRuns, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that reads samples; those of these runs it gets from them."""
    before = _runs.set(runs)
    try:
        return function(*arguments)
    finally:
        _runs.reset(before)


def read_from_runs(ranges: Sequence[tuple[str, int, int]]) -> dict[int, bytes]:
    """Return the content of those (path, offset, size) that are in runs, by their number."""
    runs = _runs.get()
    found = {} if runs is None else {number: runs.read(*part) for number, part in enumerate(ranges)}
    return {number: content for number, content in found.items() if content is not None}


def folder_of(key: str) -> Path:
    """Return where the runs of a key are on this node."""
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return Path(tempfile.gettempdir()) / f"mowe_ray_runs_{os.getuid()}" / name


def forget_runs(key: str) -> None:
    """Remove from this node what a stream has kept that has come to its end."""
    shutil.rmtree(folder_of(key), ignore_errors=True)


def _sizes(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield when each run was used, and its size."""
    for file in folder.glob("*.run"):
        with suppress(FileNotFoundError):
            status = file.stat()
            yield status.st_mtime, status.st_size, file


def _own(parent: Path) -> None:
    """Make a folder that nobody else can read or write; anyone may have made one of its name in /tmp before.

    Raises:
        OSError: It is another user's, or a link.
    """
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = parent.lstat()
    if not S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise OSError(f"{parent} is not this user's own folder")
    parent.chmod(0o700)


def _remove_unused(parent: Path) -> None:
    for folder in parent.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - max([folder.stat().st_mtime, *(used for used, *_ in _sizes(folder))]) > _UNUSED_S:
                shutil.rmtree(folder, ignore_errors=True)
