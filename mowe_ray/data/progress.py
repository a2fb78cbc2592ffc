"""A progress line on stderr for streams whose length may be unknown."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], label: str, total: int | None = None, every_s: float = 2.0) -> Iterator[Item]:
    """Pass `items` through, writing count, rate and (with `total`) time left to stderr.

    On a terminal the line is rewritten in place; in a log file each report is its own line, every
    `every_s` seconds. A closing line gives the final count.
    """
    rewrite = "\r" if sys.stderr.isatty() else ""
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            _write(rewrite, _line(label, done, now - start, total), "" if rewrite else "\n")
    _write(rewrite, _line(label, done, time.monotonic() - start, None), "\n")


def _line(label: str, done: int, elapsed_s: float, total: int | None) -> str:
    rate = done / max(elapsed_s, 1e-9)
    if total is None:
        return f"{label}: {done}, {rate:.0f}/s, {elapsed_s:.0f} s"
    left = (total - done) / max(rate, 1e-9)
    return f"{label}: {done} of {total}, {rate:.0f}/s, {left:.0f} s left"


def _write(rewrite: str, line: str, end: str) -> None:
    clear = "\x1b[K" if rewrite else ""
    sys.stderr.write(f"{rewrite}{line}{clear}{end}")
    sys.stderr.flush()
