"""Compressed shards and manifests: each process that reads one finds it unpacked in the cache of its machine.

Compressed files cannot be read at any place, so one is unpacked whole: once on each machine that scans or decodes it,
to `unpacked/` in the folder of caches, where it takes the place of its content until somebody removes it.
`mowe_ray.prepare` writes shards that need neither.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from mowe_ray.data.shards.storage import fingerprint, is_remote, open_file


def _opened_by_arrow(codec: str, packed: BinaryIO) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), codec)


_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_OPENERS |= {".zst": partial(_opened_by_arrow, "zstd"), ".lz4": partial(_opened_by_arrow, "lz4")}
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}


def cache_folder() -> Path:
    """Where scans and the built-in corpus are kept: $XDG_CACHE_HOME/mowe_ray, or ~/.cache/mowe_ray."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mowe_ray"


def plain_name(path: str) -> str:
    """Return the name that a file has when it is unpacked: `a.tar` of `a.tar.gz` or `a.tgz`; others keep theirs."""
    for short, long in _SHORT.items():
        path = path[: -len(short)] + long if path.lower().endswith(short) else path
    suffix = f".{path.rpartition('.')[2].lower()}"
    return path[: -len(suffix)] if suffix in _OPENERS else path


def plain(path: str) -> str:
    """Return where the content of a file can be read at any place: the file itself, or its unpacked copy.

    What comes before damage is unpacked.

    Raises:
        OSError: it cannot be read, or the folder of caches cannot be written.
    """
    return path if plain_name(path) == path else _unpacked(path, _version(path))


def _version(path: str) -> str:
    return _remote_version(path) if is_remote(path) else fingerprint(path)


@lru_cache(maxsize=1 << 16)
def _remote_version(path: str) -> str:
    return fingerprint(path)  # once a process: asking costs a request


def _unpacked(path: str, version: str) -> str:
    key = hashlib.blake2b(f"{path} {version}".encode(), digest_size=16).hexdigest()
    name = plain_name(path)
    copy = cache_folder() / "unpacked" / f"{key}.{name.rpartition('.')[2]}"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        part = copy.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            with open_file(path) as packed, part.open("wb") as out:
                _unpack(_opener(path)(packed), out)
            part.replace(copy)  # whoever is second replaces it with the same
        finally:
            part.unlink(missing_ok=True)
    return str(copy)


def _opener(path: str) -> Callable[..., Any]:
    long = next((long for short, long in _SHORT.items() if path.lower().endswith(short)), path)
    return _OPENERS[f".{long.rpartition('.')[2].lower()}"]


def _unpack(stream: Any, out: Any) -> None:
    try:
        shutil.copyfileobj(stream, out, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        return  # the reader finds where it ends
    except OSError as error:
        if error.errno is not None:  # bz2 and Arrow have none for damage
            raise
