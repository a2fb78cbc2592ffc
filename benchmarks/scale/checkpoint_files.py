"""Files that a rank opens, besides its own data, to resume from a checkpoint that 1,000 ranks wrote.

The checkpoint is real, of small tensors that are cut over all ranks; of the 1,000 that resume, one is run here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import Check, conclude, cpu_seconds
from safetensors.torch import save_file

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.layout import (
    FORMAT,
    commit_file,
    data_file,
    report_file,
    slices_file,
    store,
    store_json,
)
from mowe_ray.training.checkpoint.reader import newest_checkpoint
from mowe_ray.training.checkpoint.slice_table import SliceTable
from mowe_ray.training.protocols import Ranks

STEP, ELEMENTS = 100, 4


class Opened(RunFolder):
    """A run folder that notes which files are read; on a local disk tensors are mapped, not read through it."""

    def __init__(self, storage: str, name: str):
        super().__init__(storage, name)
        self.files: set[str] = set()

    def read_bytes(self, file: str) -> bytes:
        """Return the content of `file`."""
        self.files.add(file)
        return super().read_bytes(file)


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1000, help="ranks that write and read (%(default)s)")
    parser.add_argument("--tensors", type=int, default=300, help="tensors, each cut over all ranks (%(default)s)")
    arguments = parser.parse_args()
    rank = arguments.ranks // 2
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as storage:
        write(RunFolder(storage, "run"), arguments.ranks, arguments.tensors)
        folder = Opened(storage, "run")
        seconds = cpu_seconds(lambda: restore(folder, rank, arguments))
        table_bytes = (Path(storage) / "run" / slices_file(STEP)).stat().st_size
    table = {
        "ranks, tensors": f"{arguments.ranks}, {arguments.tensors}",
        "bytes of the table of slices": f"{table_bytes}",
        "CPU s to find, check and open it": f"{seconds:.2f}",
        "files": ", ".join(sorted(Path(file).name for file in folder.files)),
    }
    check = Check("files a rank opens besides its own data", len(folder.files), 3)
    return conclude("scale/checkpoint_files", table, [check])


def write(folder: RunFolder, ranks: int, tensors: int) -> None:
    """Write what `CheckpointWriter` does, without its 1,000 threads."""
    reports, files = [], []
    for rank in range(ranks):
        mine = {f"layer.{n}.weight": torch.full((ELEMENTS,), float(rank)) for n in range(tensors)}
        name = data_file(STEP, rank, ranks)
        # One file for all would be the same to the reader, but for its checksum; few ranks' data are ever read.
        written = store(folder, name, lambda local, mine=mine: save_file(mine, local))
        start = rank * ELEMENTS
        bounds = {tensor: [start, start + ELEMENTS, ranks * ELEMENTS] for tensor in mine}
        reports.append({"token": "t", **written, "stretches": bounds})
        files.append({"name": Path(name).name, **written})
        store_json(folder, report_file(STEP, rank, ranks), reports[-1])
    commit = {"format": FORMAT, "step": STEP, "world_size": ranks, "token": "t", "files": files, "state": {}}
    slices = store(folder, slices_file(STEP), SliceTable.from_reports(reports).write)
    store_json(folder, commit_file(STEP), {**commit, "slices": slices})


def restore(folder: RunFolder, rank: int, arguments: argparse.Namespace) -> None:
    """Find the checkpoint and read the slices of one rank."""

    def gather(value: Any) -> list[Any]:
        return [value] * arguments.ranks if value is not None else [[STEP] if not folder.files else None]

    checkpoint = newest_checkpoint(folder, Ranks(rank, arguments.ranks, gather, lambda value: value, print))
    assert checkpoint is not None
    for name in checkpoint.shapes:
        values = checkpoint.read(name, rank * ELEMENTS, (rank + 1) * ELEMENTS)
        assert torch.equal(values, torch.full((ELEMENTS,), float(rank)))


if __name__ == "__main__":
    sys.exit(main())
