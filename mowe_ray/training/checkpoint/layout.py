"""The files of checkpoints: names, checksums, and atomic writes.

    RUN/checkpoints/step-00000040/rank-00000-of-00002.safetensors   slices of flattened tensors
                                  rank-00000-of-00002.json          the rank's report: what it wrote, or why it failed
                                  slices.parquet                    which rank's file has which elements
                                  checkpoint.json                   the commit, written last by rank 0

A folder is a checkpoint from the moment `checkpoint.json` is in it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mowe_ray.output.run_folder import RunFolder, sync

FORMAT = 1
CHECKPOINTS = "checkpoints"
VALIDATING_FOLDER = "validating"
"""Exports of steps whose async validation has not ended."""
_CHUNK_BYTES = 16 << 20


def step_folder(step: int) -> str:
    """Folder of the checkpoint of `step`, in the run folder."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def commit_file(step: int) -> str:
    """File that makes the folder of `step` a checkpoint."""
    return f"{step_folder(step)}/checkpoint.json"


def slices_file(step: int) -> str:
    """File of the `SliceTable`; checkpoints of earlier versions have none."""
    return f"{step_folder(step)}/slices.parquet"


def data_file(step: int, rank: int, world_size: int) -> str:
    """File of the tensor slices of one rank."""
    return f"{step_folder(step)}/rank-{rank:05d}-of-{world_size:05d}.safetensors"


def report_file(step: int, rank: int, world_size: int) -> str:
    """File in which one rank reports what it wrote, or why it failed."""
    return f"{step_folder(step)}/rank-{rank:05d}-of-{world_size:05d}.json"


def saved_steps(folder: RunFolder) -> list[int]:
    """Return the steps that have a folder, complete or not, in ascending order."""
    names = (re.fullmatch(r"step-(\d+)", name) for name in folder.names(CHECKPOINTS))
    return sorted(int(match[1]) for match in names if match)


def committed_steps(folder: RunFolder) -> list[int]:
    """Return the steps whose folder has a `checkpoint.json`, in ascending order."""
    return [step for step in saved_steps(folder) if folder.exists(commit_file(step))]


def remove_step(folder: RunFolder, step: int) -> None:
    """Remove the folder of `step`, its commit first: an interrupted removal leaves no checkpoint."""
    folder.remove(commit_file(step))
    folder.remove(step_folder(step))


def copy_checkpoint_from(folder: RunFolder, other: RunFolder, step: int) -> None:
    """Replace the checkpoints and pending validations of a run by the checkpoint of `step` of another run.

    Args:
        folder: The run whose checkpoints are replaced.
        other: The run to copy from.
        step: A committed step of `other`.
    """
    folder.remove(VALIDATING_FOLDER)
    for own in saved_steps(folder):
        remove_step(folder, own)
    commit = commit_file(step)
    files = [f"{step_folder(step)}/{name}" for name in other.names(step_folder(step))]
    for file in [*(file for file in files if file != commit), commit]:
        with tempfile.TemporaryDirectory(prefix="mowe_ray_checkpoint_") as scratch:
            other.fetch(file, Path(scratch) / "file")
            store(folder, file, partial(shutil.copyfile, Path(scratch) / "file"))


def store(folder: RunFolder, file: str, write: Callable[[Path], Any]) -> dict[str, int]:
    """Write `file` atomically; on a local disk also durably (fsync).

    Args:
        write: Writes the content to the local path it is given.

    Returns:
        `bytes` and `crc32` of the file.
    """
    target = folder.local_path(file)
    if target is None:
        with tempfile.TemporaryDirectory(prefix="mowe_ray_checkpoint_") as scratch:
            local = Path(scratch) / "file"
            write(local)
            folder.put(local, file)
            return digest(local)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        write(part)
        sync(part)
        written = digest(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)  # of a full disk
    for parent in (target.parent, target.parent.parent):
        sync(parent)
    return written


def digest(local: Path) -> dict[str, int]:
    """Return `bytes` and `crc32` of a local file."""
    size, crc = 0, 0
    with local.open("rb") as f:
        while chunk := f.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def store_json(folder: RunFolder, file: str, value: dict[str, Any]) -> None:
    """Write a JSON object together with its own checksum."""
    text = _dump(value | {"crc32_of_the_rest": zlib.crc32(_dump(value).encode())})
    store(folder, file, lambda local: local.write_text(text, encoding="utf-8"))


def load_json(folder: RunFolder, file: str) -> dict[str, Any]:
    """Return what `store_json` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not what was written.
    """
    try:
        value = json.loads(folder.read_text(file))
        crc = value.pop("crc32_of_the_rest")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is garbage") from error
    if crc != zlib.crc32(_dump(value).encode()):
        raise ValueError(f"{file} has been changed")
    return dict(value)


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
