"""Tables of text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO


def write_table(out: TextIO, rows: Sequence[Sequence[str]]) -> None:
    """Write a table, its columns as wide as their widest cell; a row's last cell may be longer."""
    columns = max(map(len, rows))
    widths = [max((len(row[i]) for row in rows if len(row) == columns), default=0) for i in range(columns)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        out.write(f"  {'  '.join(cells).rstrip()}\n")
