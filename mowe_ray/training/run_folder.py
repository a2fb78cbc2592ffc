"""The folder a run writes: a local path or any fsspec URL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec


class RunFolder:
    """Files of one run below `STORAGE/NAME`."""

    def __init__(self, storage: str, name: str):
        """Name the folder; nothing is created before the first write."""
        if "://" not in storage:
            storage = str(Path(storage).absolute())
        self.storage = storage.rstrip("/")
        self.url = f"{self.storage}/{name}"
        self._filesystem, self._root = fsspec.core.url_to_fs(self.url)

    def exists(self, file: str = "") -> bool:
        """Whether the folder, or a file in it, is there."""
        return bool(self._filesystem.exists(f"{self._root}/{file}".rstrip("/")))

    def files(self, folder: str) -> list[str]:
        """Return the files below `folder`, sorted, as the other methods take them."""
        if not self.exists(folder):
            return []
        found = self._filesystem.find(f"{self._root}/{folder}")
        return sorted(f"{folder}/{name.rsplit(f'/{folder}/', 1)[1]}" for name in found)

    def path(self, file: str) -> str:
        """Full path or URL of `file`."""
        return f"{self.url}/{file}"

    def read_text(self, file: str) -> str:
        """Return the content of `file`."""
        with self._filesystem.open(f"{self._root}/{file}", "rb") as f:
            return bytes(f.read()).decode()

    def write_text(self, file: str, text: str) -> None:
        """Write `text` as UTF-8; see `write_bytes`."""
        self.write_bytes(file, text.encode())

    def write_bytes(self, file: str, content: bytes) -> None:
        """Write `file`, whole or not at all where the file system can rename."""
        target = f"{self._root}/{file}"
        self._filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        with self._filesystem.open(f"{target}.part", "wb") as f:
            f.write(content)
        self._filesystem.mv(f"{target}.part", target)

    def append_text(self, file: str, text: str) -> None:
        """Add `text` to the end of `file`."""
        if self._filesystem.protocol[0] == "file":
            with self._filesystem.open(f"{self._root}/{file}", "ab") as f:
                f.write(text.encode())
        else:  # object stores cannot append: all of it again
            before = self.read_text(file) if self.exists(file) else ""
            self.write_text(file, before + text)

    def keep_lines_up_to(self, file: str, step: int) -> None:
        """Drop the JSON lines of `file` whose `step` is later, and a half-written one; begin the file if it is new."""
        lines = self.read_text(file).splitlines(keepends=True) if self.exists(file) else []
        kept = (line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
        self.write_text(file, "".join(kept))

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
            name = f"{target}/{file.relative_to(local).as_posix()}"
            self._filesystem.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
            self._filesystem.put_file(str(file), name)
