"""The table of a checkpoint that says which rank's file has which elements of which tensor."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

_COLUMNS = ("start", "stop", "rank")


@dataclass(frozen=True)
class SliceTable:
    """The slices of all tensors: N of them, tensor after tensor, those of a tensor in ascending order.

    Attributes:
        shapes: Shape of each tensor, in the order of the slices.
        first: Where the slices of each tensor begin, in the same order, and N.
        start, stop: (N,) first element of a slice in the flattened tensor, and the one after its last.
        rank: (N,) the rank that wrote it.
    """

    shapes: dict[str, tuple[int, ...]]
    first: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    stop: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int32]

    @classmethod
    def from_reports(cls, reports: Sequence[Mapping[str, Any]]) -> SliceTable:
        """Join what the ranks report: {"stretches": {name: [start, stop, *shape]}} of each, in the order of ranks."""
        shapes: dict[str, tuple[int, ...]] = {}
        numbers: dict[str, int] = {}
        rows: list[tuple[int, int, int, int]] = []
        for rank, report in enumerate(reports):
            for name, (start, stop, *shape) in report["stretches"].items():
                shapes[name] = tuple(shape)
                rows.append((numbers.setdefault(name, len(numbers)), start, stop, rank))
        tensor, start, stop, rank_of = np.asarray(rows, np.int64).reshape(-1, 4).T
        order = np.lexsort((stop, start, tensor))
        first = np.searchsorted(tensor[order], np.arange(len(shapes) + 1))
        return cls(shapes, first, start[order], stop[order], rank_of[order].astype(np.int32))

    def overlapping(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, rank) of the slices that have elements from `start` to `stop` of a tensor."""
        number = self._numbers.get(name)
        if number is None:
            return
        low, high = self.first[number : number + 2]
        at = low + max(0, int(np.searchsorted(self.start[low:high], start, side="right")) - 1)
        while at < high and self.start[at] < stop:
            yield int(self.start[at]), int(self.stop[at]), int(self.rank[at])
            at += 1

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.shapes)}

    def write(self, local: Path) -> None:
        """Write the table to a local file: differences of bounds are kept, which are small or all alike."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        tensors = {"tensors": json.dumps([list(self.shapes.items()), self.first.tolist()])}
        pq.write_table(
            pa.table(columns).replace_schema_metadata(tensors),
            local,
            compression="zstd",
            use_dictionary=False,
            column_encoding=dict.fromkeys(columns, "DELTA_BINARY_PACKED"),
        )

    @classmethod
    def read(cls, content: bytes) -> SliceTable:
        """Read what `write` wrote."""
        table = pq.read_table(io.BytesIO(content))
        shapes, first = json.loads(table.schema.metadata[b"tensors"])
        columns = (table[name].to_numpy() for name in _COLUMNS)
        return cls({name: tuple(shape) for name, shape in shapes}, np.asarray(first, np.int64), *columns)
