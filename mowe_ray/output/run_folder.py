"""The folder of a run: a local path or any fsspec URL."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import fsspec

_NAMED = 8  # damaged lines that a warning names


_PARTS = ".parts"  # after the name of a file: the folder of what was added to it on an object store


def _content_id(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunFolder:
    """Files of one run below `STORAGE/NAME`."""

    def __init__(self, storage: str, name: str):
        """Name the folder; nothing is created before the first write.

        Raises:
            ValueError: The kind of URL is unknown, or needs a package that is not installed.
        """
        if "://" not in storage:
            storage = str(Path(storage).expanduser().absolute())
        self.storage = storage.rstrip("/")
        self.url = f"{self.storage}/{name}"
        # Where the next part of a file of lines goes, by the file; of this process, for one at a time appends to it.
        self._next_parts: dict[str, tuple[str, int]] = {}
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:  # "Install s3fs to access S3"
            package = re.search(r"nstall (\S+)", str(error))
            fix = f"pip install {package[1]}" if package else str(error)
            raise ValueError(f"storage: {self.url!r} needs a package that is not installed: {fix}") from error
        except Exception as error:  # each file system has errors of its own
            raise ValueError(f"storage: {self.url!r} cannot be opened: {error}") from error

    @property
    def _now(self) -> Any:
        # The file system, without the listings it remembers: another machine may have written since.
        self._filesystem.invalidate_cache()
        return self._filesystem

    def exists(self, file: str = "") -> bool:
        """Whether the folder, or a file in it, is there."""
        return bool(self._now.exists(f"{self._root}/{file}".rstrip("/")))

    def names(self, folder: str) -> list[str]:
        """Return the names of the files and folders in `folder`, sorted; none if it is not there."""
        try:
            paths = self._now.ls(f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def path(self, file: str) -> str:
        """Full path or URL of `file`."""
        return f"{self.url}/{file}"

    def local_path(self, file: str) -> Path | None:
        """Path of `file` on this machine's own file systems, None for any other URL."""
        return Path(self._root) / file if self._filesystem.protocol[0] == "file" else None

    def read_bytes(self, file: str) -> bytes:
        """Return the content of `file`."""
        with self._now.open(f"{self._root}/{file}", "rb") as f:
            return bytes(f.read())

    def read_text(self, file: str) -> str:
        """Return the content of `file`."""
        return self.read_bytes(file).decode()

    def read_lines(self, file: str) -> list[str]:
        """Return the lines of `file`, with their ends: none if it is not there, and not a half-written last one.

        Only a line feed ends a line: JSON strings may hold U+2028 and others that `splitlines` cuts at.
        """
        if not self.exists(file):
            return []
        content = self.read_bytes(file)
        if self.local_path(file) is None:
            content += self._read_parts(file, content)
        whole, feed, _ = content.rpartition(b"\n")
        return [f"{line}\n" for line in whole.decode(errors="replace").split("\n")] if feed else []

    def read_json(self, file: str) -> Any:
        """Return the value in a JSON file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged; names it.
        """
        try:
            return json.loads(self.read_bytes(file))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path(file)} is damaged, not JSON ({error}): put back a copy of it, or remove it"
            ) from error

    def find_json(self, file: str, *keys: str, warn: Callable[[str], object] | None = None) -> dict[str, Any] | None:
        """Return the JSON object in `file`; None if it is not there, is damaged, or lacks one of `keys`.

        Args:
            warn: Shows a line to the user about a damaged file, which the caller writes again.
        """
        try:
            found = self.read_json(file)
            if isinstance(found, dict) and found.keys() >= set(keys):
                return found
            raise ValueError(f"{self.path(file)} is damaged: it lacks what belongs in it")
        except FileNotFoundError:
            return None
        except ValueError as error:
            if warn is not None:
                warn(f"warning: {error}; it is written again")
            return None

    def read_records(self, file: str, *keys: str, warn: Callable[[str], object] | None = None) -> list[dict[str, Any]]:
        """Return the JSON objects that are the lines of `file`, without lines that are damaged or lack one of `keys`.

        Args:
            warn: Shows a line to the user where there are such lines.
        """
        return [record for _, record in self._whole_lines(file, keys, warn)]

    def _whole_lines(
        self, file: str, keys: Sequence[str], warn: Callable[[str], object] | None
    ) -> list[tuple[str, dict[str, Any]]]:
        whole, damaged = [], []
        for number, line in enumerate(self.read_lines(file), start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and record.keys() >= set(keys):
                whole.append((line, record))
            else:
                damaged.append(str(number))
        if damaged and warn is not None:
            some = ", ".join(damaged[:_NAMED]) + (", ..." if len(damaged) > _NAMED else "")
            warn(f"warning: {self.path(file)} is damaged in line {some}, which is left out")
        return whole

    def write_text(self, file: str, text: str) -> None:
        """Write `text` as UTF-8; see `write_bytes`."""
        self.write_bytes(file, text.encode())

    def write_bytes(self, file: str, content: bytes) -> None:
        """Write `file`, atomically where the file system can rename, and durably on this machine's own disks.

        Of several that write the same file at once, the last one's content stays.
        """
        self._next_parts.pop(file, None)
        target = f"{self._root}/{file}"
        part = f"{target}.{uuid.uuid4().hex}.part"  # its own for each writer: ranks may write the same file
        self._filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        try:
            with self._filesystem.open(part, "wb") as f:
                f.write(content)
            local = self.local_path(file)
            if local is not None:  # a machine that goes down must not leave the name without the content
                sync(Path(part))
                Path(part).replace(target)
            else:  # on object stores a copy: readers there never see a half-written object anyway
                self._filesystem.mv(part, target)
        except BaseException:
            with contextlib.suppress(OSError):  # full or gone: the first error is the one to report
                self._filesystem.rm(part)
            raise
        if local:
            sync(local.parent)

    def create_bytes(self, file: str, content: bytes) -> bool:
        """Write `file` unless it exists; returns whether it was written.

        No two can both succeed on a local path; elsewhere that depends on the file system.
        """
        target = f"{self._root}/{file}"
        self._filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        try:
            if local := self.local_path(file):
                with local.open("xb") as f:
                    f.write(content)
            else:
                self._now.pipe_file(target, content, mode="create")
        except FileExistsError:
            return False
        return True

    def append_text(self, file: str, text: str) -> None:
        """Add `text` to the end of `file`, all of it or nothing, and durably as `write_bytes`.

        `read_lines` and `read_records` read it back; on object stores `file` itself keeps what `write_lines` wrote.
        """
        if local := self.local_path(file):
            local.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a full disk is known here, and not when the file is closed.
            with local.open("ab", buffering=0) as f:
                size, content = f.tell(), text.encode()
                try:
                    while content:
                        content = content[f.write(content) :]
                    os.fsync(f.fileno())
                except OSError:
                    f.truncate(size)  # no half lines on a full disk
                    raise
        elif text:
            self._append_part(file, text.encode())

    # Object stores cannot append. What is added to a file there becomes numbered parts beside it, that belong to the
    # content the file had then: written anew, it has none. So each change is that of one object, whole or not at all.

    def _append_part(self, file: str, content: bytes) -> None:
        if file not in self._next_parts:
            if not self.exists(file):
                self.write_bytes(file, b"")
            content_id = _content_id(self.read_bytes(file))
            self._filesystem.makedirs(f"{self._root}/{file}{_PARTS}", exist_ok=True)
            self._next_parts[file] = content_id, len(self._parts(file, content_id))
        content_id, number = self._next_parts[file]
        self._filesystem.pipe_file(f"{self._root}/{file}{_PARTS}/{content_id}-{number:08d}", content)
        self._next_parts[file] = content_id, number + 1

    def _parts(self, file: str, content_id: str) -> list[str]:
        return [f"{file}{_PARTS}/{name}" for name in self.names(file + _PARTS) if name.startswith(f"{content_id}-")]

    def _read_parts(self, file: str, content: bytes) -> bytes:
        paths = [f"{self._root}/{part}" for part in self._parts(file, _content_id(content))]
        return b"".join(self._filesystem.cat_ranges(paths, None, None, on_error="raise"))

    def write_lines(self, file: str, lines: Iterable[str]) -> None:
        """Write `file` anew, in place of it and of what was added to it."""
        self.write_text(file, "".join(lines))
        if self.local_path(file) is None and (parts := self.names(file + _PARTS)):
            self._filesystem.rm([f"{self._root}/{file}{_PARTS}/{part}" for part in parts])

    def keep_lines_up_to(self, file: str, step: int, warn: Callable[[str], object] | None = None) -> None:
        """Drop the JSON lines of `file` whose `step` is later, and damaged ones; begin the file if it is new.

        Args:
            warn: As for `read_records`.
        """
        lines = self._whole_lines(file, ["step"], warn)
        self.write_lines(file, (line for line, record in lines if record["step"] <= step))

    def write_json(self, file: str, value: Any) -> None:
        """Write `value` as indented JSON."""
        self.write_text(file, json.dumps(value, indent=2) + "\n")

    def upload(self, local: Path, folder: str) -> None:
        """Copy the local folder to `folder`, replacing what was there."""
        target = f"{self._root}/{folder}"
        if self._filesystem.exists(target):
            self._filesystem.rm(target, recursive=True)
        self._filesystem.makedirs(target, exist_ok=True)
        for file in sorted(p for p in local.rglob("*") if p.is_file()):
            self.put(file, f"{folder}/{file.relative_to(local).as_posix()}")

    def put(self, local: Path, file: str) -> None:
        """Copy the local file to `file`."""
        target = f"{self._root}/{file}"
        self._filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._filesystem.put_file(str(local), target)
        if written := self.local_path(file):
            sync(written)

    def fetch(self, file: str, local: Path) -> None:
        """Copy `file` to the local file."""
        self._now.get_file(f"{self._root}/{file}", str(local))

    def remove(self, file: str) -> None:
        """Remove a file, or a folder with all that is in it; one that is not there is no error."""
        if self.exists(file):
            with contextlib.suppress(FileNotFoundError):  # somebody else was faster
                self._filesystem.rm(f"{self._root}/{file}", recursive=True)
