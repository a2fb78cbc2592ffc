"""Remote tars, walked from header to header: what lies between is not read.

A request brings a window of 4 KB: in most tars the text of a sample, the header of the next and the head of its audio.
Where the next window is near the last, as in tars of short clips, windows double up to 1 MB instead: bytes then cost
less than requests. An index of the tar beside it, as other tools write it, lets many windows be asked for at once:

    A.tar.idx   of Megatron-Energon: the byte offset of each sample, as little-endian 64-bit integers
    A.idx       of NVIDIA DALI (wds2idx): a line a sample, with suffix, offset, size [and name] of each of its files
"""

import io
import os
import re
from bisect import bisect, bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

import numpy as np

from mowe_ray.data.shards.byte_ranges import read_ranges
from mowe_ray.data.shards.storage import file_system, is_remote, open_file, retried

_WINDOW_BYTES = 4096
_LARGEST_BYTES = 1 << 20
_NEAR_BYTES = 16 << 10  # a gap that is cheaper to read than to ask again
_KEPT = 256  # windows
_AT_ONCE = 64  # windows that an index lets us ask for together
_HEADER_BYTES = 512
_DALI = re.compile(rb"^\S+ (\d+) \d+", re.MULTILINE)


def open_to_walk(path: str) -> BinaryIO:
    """Open a tar of which the headers and a few small files are read, in their order."""
    if not is_remote(path):
        return open_file(path)
    fs, inner = file_system(path)
    size = int(retried(path, lambda: fs.size(inner)))
    return cast(BinaryIO, WalkedFile(path, size, _samples_of(path, size)))


class WalkedFile(io.RawIOBase):
    """A remote file that is read in windows.

    Args:
        size: in bytes.
        ahead: places around which windows will be wanted, ascending.
    """

    def __init__(self, url: str, size: int, ahead: Sequence[int] = ()) -> None:
        super().__init__()
        self._url, self._size, self._at = url, size, 0
        self._ahead, self._asked = ahead, 0
        self._windows: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)
        self._end, self._last_bytes = -_NEAR_BYTES - 1, _WINDOW_BYTES  # of the last window

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        start, end = self._at, min(self._at + len(buffer), self._size)
        while self._at < end:
            known = self._known(self._at) or self._read(self._at, end - self._at)
            if not known:
                break  # shorter than it was
            part = known[: end - self._at]
            buffer[self._at - start : self._at - start + len(part)] = part
            self._at += len(part)
        return self._at - start

    def _known(self, at: int) -> bytes:
        """Return what is known from a place on; nothing if the byte there is not."""
        for start, content in reversed(self._windows):
            if start <= at < start + len(content):
                return content[at - start :]
        return b""

    def _read(self, at: int, wanted: int) -> bytes:
        near = 0 <= at - self._end <= _NEAR_BYTES
        self._last_bytes = min(2 * self._last_bytes, _LARGEST_BYTES) if near else _WINDOW_BYTES
        size = min(max(wanted, self._last_bytes), self._size - at)
        self._end = at + size
        # The text of a sample is often the last of its files, just before the next sample.
        self._asked = max(self._asked, bisect(self._ahead, self._end))
        more = [max(place - _WINDOW_BYTES // 2, 0) for place in self._ahead[self._asked : self._asked + _AT_ONCE]]
        self._asked += len(more)
        ranges = [(self._url, start, min(_WINDOW_BYTES, self._size - start)) for start in more]
        content, *others = read_ranges([(self._url, at, size), *ranges])
        if not isinstance(content, bytes):
            raise content
        self._windows += [(start, found) for start, found in zip(more, others, strict=True) if isinstance(found, bytes)]
        if size <= _LARGEST_BYTES:  # others are files that are read whole, and once
            self._windows.append((at, content))
        return content


def _samples_of(path: str, size: int) -> list[int]:
    """Return where the samples of a tar begin, by an index beside it; none without one that fits."""
    for index, read in ((f"{path}.idx", _energon), (f"{path.removesuffix('.tar')}.idx", _dali)):
        fs, inner = file_system(index)
        try:
            places = read(fs.cat_file(inner))
        except Exception:  # noqa: BLE001 - each file system has errors of its own; it is a hint only
            continue
        if places and places == sorted(places) and places[0] >= 0 and places[-1] <= size:
            return places[: bisect_left(places, size)]
    return []


def _energon(content: bytes) -> list[int]:
    return [int(place) for place in np.frombuffer(content, "<u8")]


def _dali(content: bytes) -> list[int]:
    return [int(offset) - _HEADER_BYTES for offset in _DALI.findall(content)]
