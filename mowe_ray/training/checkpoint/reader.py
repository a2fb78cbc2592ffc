"""Reads checkpoints: finds the newest complete one, and assembles tensors from its files.

A checkpoint holds slices of flattened tensors. Any rank may read any slice, so a checkpoint can be restored on another
number of ranks than wrote it.
"""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.layout import (
    FORMAT,
    commit_file,
    data_file,
    digest,
    load_json,
    remove_step,
    report_file,
    saved_steps,
    slices_file,
    step_folder,
)
from mowe_ray.training.checkpoint.slice_table import SliceTable
from mowe_ray.training.protocols import Ranks


@dataclass(frozen=True)
class TensorSlice:
    """A contiguous slice of a flattened tensor.

    Attributes:
        data: Elements of the slice (N), on the CPU.
        start: Index of its first element in the flattened tensor.
        shape: Shape of the full tensor.
    """

    data: torch.Tensor
    start: int
    shape: tuple[int, ...]


class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: Optimizer steps finished.
        state: JSON state that was saved with the tensors.
    """

    def __init__(self, folder: RunFolder, step: int):
        """Read the table of slices; tensors are read by `read`."""
        commit = load_json(folder, commit_file(step))
        self.step: int = commit["step"]
        self.state: dict[str, Any] = commit["state"]
        self._folder, self._world_size = folder, commit["world_size"]
        self._slices = _slices(folder, commit)
        self._opened: dict[str, Any] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return self._slices.shapes

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements `start` to `stop` of the flattened tensor `name` (stop - start), in the type it was written.

        Raises:
            ValueError: The checkpoint does not have all of them.
        """
        pieces, at = [], start
        for begin, end, rank in self._slices.overlapping(name, start, stop):
            # In ascending order: each adds its elements from `at` on.
            if begin <= at < end and at < stop:
                upto, file = min(end, stop), data_file(self.step, rank, self._world_size)
                pieces.append(self._open(file).get_slice(name)[at - begin : upto - begin])
                at = upto
        if at < stop:
            raise ValueError(
                f"{self._folder.path(step_folder(self.step))} has no element {at} of {name}: "
                "it was written by another model; choose another name"
            )
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _open(self, file: str) -> Any:
        """Return the open file: mapped into memory where it is local, else fetched once."""
        if file not in self._opened:
            local = self._folder.local_path(file)
            if local is None:
                self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="mowe_ray_checkpoint_")
                local = Path(self._scratch.name) / file.replace("/", "_")
                self._folder.fetch(file, local)
            self._opened[file] = safe_open(local, framework="pt")
        return self._opened[file]


def _slices(folder: RunFolder, commit: dict[str, Any]) -> SliceTable:
    """Return the table of a checkpoint; without one, as of earlier versions, it is joined from every rank's report.

    Raises:
        ValueError: The table is not what was written.
    """
    step, world_size = commit["step"], commit["world_size"]
    if "slices" not in commit:
        reports = (load_json(folder, report_file(step, rank, world_size)) for rank in range(world_size))
        return SliceTable.from_reports([*reports])
    content = folder.read_bytes(slices_file(step))
    if {"bytes": len(content), "crc32": zlib.crc32(content)} != commit["slices"]:
        raise ValueError(f"{slices_file(step)} has been changed")
    return SliceTable.read(content)


def newest_checkpoint(
    folder: RunFolder,
    ranks: Ranks,
) -> Checkpoint | None:
    """Return the newest complete checkpoint, None in a new run; removes later and unfinished ones. Collective.

    The ranks share the work of comparing every file with its checksum. A damaged checkpoint is logged, and the one
    before it is tried.

    Raises:
        ValueError: There are checkpoints and none is complete, or one has the format of another version.
    """
    steps: list[int] = ranks.gather(saved_steps(folder) if ranks.is_rank_zero else None)[0]
    damaged = False
    for step in reversed(steps):
        # All ranks see all problems, so that they agree on the checkpoint.
        problem = next(filter(None, ranks.gather(_problem(folder, step, ranks.rank, ranks.world_size))), None)
        if problem is None:
            _clear(folder, [s for s in steps if s <= step], ranks)
            return Checkpoint(folder, step)
        damaged = damaged or problem != _UNFINISHED
        if ranks.is_rank_zero:
            ranks.log(f"warning: {folder.path(step_folder(step))} is not used: {problem}")
    if damaged:
        raise ValueError(
            f"none of the checkpoints in {folder.url} is whole: put one back, "
            "or choose another name to start from the beginning"
        )
    _clear(folder, [], ranks)
    return None


_UNFINISHED = "it was never finished"


def _problem(folder: RunFolder, step: int, rank: int, world_size: int) -> str | None:
    """Return what is wrong with the files that this rank checks, None if they are intact."""
    try:
        commit = load_json(folder, commit_file(step))
    except FileNotFoundError:
        return _UNFINISHED
    except ValueError as error:
        return str(error)
    if commit["format"] != FORMAT:
        raise ValueError(f"{folder.path(step_folder(step))} was written by another version of mowe_ray: use that one")
    # Files of the ranks that wrote, shared out over those that read: the numbers may differ.
    try:
        if rank == 0:  # the others find the same when they open the checkpoint
            _slices(folder, commit)
        for writer in range(rank, commit["world_size"], world_size):
            report = load_json(folder, report_file(step, writer, commit["world_size"]))
            if report["token"] != commit["token"]:
                return f"rank-{writer:05d} is of another save"
            _compare(folder, f"{step_folder(step)}/{commit['files'][writer]['name']}", commit["files"][writer])
    except FileNotFoundError as error:
        return f"a file is missing: {error.filename or error}"
    except ValueError as error:
        return str(error)
    return None


def _compare(folder: RunFolder, file: str, expected: dict[str, Any]) -> None:
    local = folder.local_path(file)
    if local is None:
        with tempfile.TemporaryDirectory(prefix="mowe_ray_checkpoint_") as scratch:
            folder.fetch(file, Path(scratch) / "file")
            actual = digest(Path(scratch) / "file")
    else:
        actual = digest(local)
    for key, value in actual.items():
        if value != expected[key]:
            raise ValueError(f"{file} has {value} as its {key}, instead of {expected[key]}")


def _clear(folder: RunFolder, keep: list[int], ranks: Ranks) -> None:
    """Remove, on rank 0, the steps not kept and those never finished; the others wait."""
    if ranks.is_rank_zero:
        for step in saved_steps(folder):
            if step not in keep or not folder.exists(commit_file(step)):
                remove_step(folder, step)
    ranks.gather(None)
