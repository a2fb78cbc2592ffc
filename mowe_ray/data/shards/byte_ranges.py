"""Ranges of bytes of local and remote files."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from fsspec.utils import merge_offset_ranges

from mowe_ray.data.sample import StorageError, is_about_storage
from mowe_ray.data.shards.kept_runs import read_from_runs
from mowe_ray.data.shards.storage import SHORTER, file_system, is_remote, reason, retried

# Between two ranges, for which no other request is worth its time: a header of a tar, and what fills its blocks.
_GAP_BYTES = 4096


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes | OSError]:
    """Yield the bytes of each (path, offset, size), or why there are none.

    Local ranges are read one by one as they are taken; remote ones at once, in concurrent requests.

    Raises:
        OSError: the storage fails, and not for one file.
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
                    # Unbuffered: ranges are read at random places, and read-ahead would be thrown away.
                    files[path] = stack.enter_context(Path(path).open("rb", buffering=0))
                files[path].seek(at)
                content: bytes | OSError = files[path].read(size)
            except OSError as error:
                if is_about_storage(error):
                    raise
                content = error
            yield content


def _read_remote(ranges: Sequence[tuple[str, int, int]]) -> list[bytes | OSError]:
    """Read ranges at once; those that fail are read again."""
    contents: dict[int, bytes | OSError] = {**read_from_runs(ranges)}

    def read() -> None:
        left = [number for number in range(len(ranges)) if number not in contents]
        paths, starts, ends = zip(
            *((path, at, at + size) for path, at, size in map(ranges.__getitem__, left)), strict=True
        )
        fs, _ = file_system(paths[0])  # the shards of one source share a file system
        # A clip and its JSON are neighbours: one request.
        requests = merge_offset_ranges([*paths], [*starts], [*ends], max_gap=_GAP_BYTES)
        found = fs.cat_ranges(*requests, on_error="return")
        begins = list(zip(requests[0], requests[1], strict=True))
        failures = []
        for number in left:
            path, at, size = ranges[number]
            place = bisect_right(begins, (path, at)) - 1
            content, at = found[place], at - begins[place][1]
            if isinstance(content, bytes):
                contents[number] = content[at : at + size]
            elif getattr(content.__cause__ or content, "status", None) == SHORTER:
                contents[number] = OSError(str(content))
            else:  # also a shard that is gone: it was there when it was indexed
                failures.append(StorageError(f"{ranges[number][0]}: {reason(content)}"))
        if failures:
            raise failures[0]

    if len(contents) < len(ranges):
        retried(ranges[0][0], read)
    return [contents[number] for number in range(len(ranges))]
