"""Text for people: the lines of a run, progress of counted work, tables, and numbers with their units.

All is plain text without colour codes. What is under way moves in place on a terminal, and is a line with the time each
time elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")
Clock = Callable[[], float]

LINE = 71
"""Characters of a line that fits 80 columns after the time of day."""
_UNLIMITED = 100_000  # columns; rich needs a number


class ProgressLine(str):
    """A line about work under way, which a terminal shows in place of the one before.

    Attributes:
        done: Fraction of the work that is done.
    """

    def __new__(cls, line: str, done: float) -> ProgressLine:
        made = super().__new__(cls, line)
        made.done = done
        return made

    done: float

    def __reduce__(self) -> tuple[type[ProgressLine], tuple[str, float]]:
        return ProgressLine, (str(self), self.done)


class RunDisplay:
    """Shows the lines of a run on standard error; use it as a context and call it with each line.

    On a terminal the last `ProgressLine` stays below the others, above a bar. Elsewhere every line has the time.
    """

    def __init__(self) -> None:
        self._live = None
        if sys.stderr.isatty():
            console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)
        self._started = False

    def __enter__(self) -> RunDisplay:
        return self

    def __call__(self, line: str) -> None:
        """Show a line; from any thread."""
        if self._live is None:
            _log_to_stderr(f"{time.strftime('%H:%M:%S')} {line}")
        elif isinstance(line, ProgressLine):
            if not self._started:
                self._started = True
                self._live.start()
            bar = ProgressBar(total=1.0, completed=min(line.done, 1.0), width=LINE)
            self._live.update(Group(Text(line), bar), refresh=True)
        else:
            self._live.console.print(Text(line))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None and self._started:
            self._live.stop()


def folded(parts: Sequence[str]) -> str:
    """Join parts by two spaces, as lines of at most `LINE` characters where each part allows it."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= LINE:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}")
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """Break a sentence into lines of at most `LINE` characters, between words."""
    return textwrap.fill(text, LINE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def labelled(label: str, text: str) -> str:
    """Return a line of the header of a run."""
    return f"{label:<10} {text}"


class Pace:
    """Rate of counted work and the time it has left, measured from the creation or the last `restart`.

    Args:
        total: How much there is to do, in any unit; None if that is not known.
        done: How much of it is done at the start. Assign to the attribute as the work proceeds.
        clock: Returns the time in seconds.
    """

    def __init__(self, total: float | None, done: float = 0, clock: Clock = time.monotonic):
        self.total, self.done, self._clock = total, done, clock
        self.restart()

    def restart(self) -> None:
        """Measure from here on, after a start-up that takes no longer for more work."""
        self._start_s, self._start_done = self._clock(), self.done

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of the measurement."""
        return self._clock() - self._start_s

    @property
    def rate(self) -> float | None:
        """Work done per second; None before any is done."""
        elapsed_s, done = self.elapsed_s, self.done - self._start_done
        return done / elapsed_s if elapsed_s > 0 and done > 0 else None

    @property
    def left_s(self) -> float | None:
        """Seconds until all is done at the measured rate; None if the total or the rate is not known."""
        if self.total is None or self.done <= self._start_done:
            return None
        return self.elapsed_s * max(0.0, self.total - self.done) / (self.done - self._start_done)


class ProgressReporter:
    """Reports counted work that is under way: how much is done, its rate and the time left.

    Args:
        label: What is done, such as `preparing shards/train`.
        total: How much there is to do; None if that is not known.
        unit: What is counted, in the plural.
        log: Prints a line. By default, lines go to standard error, where a terminal shows the last one only.
        every_s: Seconds between two lines, at least.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        label: str,
        total: float | None = None,
        *,
        unit: str = "",
        log: Callable[[str], object] | None = None,
        every_s: float = 10.0,
        clock: Clock = time.monotonic,
    ):
        self.label, self._unit, self._every_s, self._clock = label, f" {unit}" if unit else "", every_s, clock
        self._log = log or _log_to_stderr
        # Only a terminal can replace a line: log files get each line once.
        self._rewrites = log is None and sys.stderr.isatty()
        self._last_s = clock()
        self._pace = Pace(total, clock=clock)

    @property
    def done(self) -> float:
        """How much is done."""
        return self._pace.done

    def restart(self) -> None:
        """Measure the rate from here on; see `Pace.restart`."""
        self._pace.restart()

    def advance(self, count: float = 1) -> None:
        """Add `count` to what is done, and print a line if one is due."""
        self._pace.done += count
        now = self._clock()
        if now - self._last_s >= self._every_s:
            self._last_s = now
            self._print(self._line(), end="")

    def finish(self) -> None:
        """Print how much was done, and how long it took."""
        pace = self._pace
        line = f"{self.label}: {pace.done:,.0f}{self._unit}{_rate(pace.rate)}, {duration(pace.elapsed_s)}"
        self._print(line, end="\n")

    def _line(self) -> str:
        pace, left_s = self._pace, self._pace.left_s
        of = "" if pace.total is None else f" of {pace.total:,.0f}"
        left = "" if left_s is None else f", {duration(left_s)} left"
        return f"{self.label}: {pace.done:,.0f}{of}{self._unit}{_rate(pace.rate)}{left}"

    def _print(self, line: str, end: str) -> None:
        if self._rewrites:
            sys.stderr.write(f"\r{line}\x1b[K{end}")
            sys.stderr.flush()
        else:
            self._log(line)


def track(items: Iterable[Item], label: str, total: int | None = None, every_s: float = 2.0) -> Iterator[Item]:
    """Yield `items`, and report on standard error how many there were."""
    progress = ProgressReporter(label, total, every_s=every_s)
    for item in items:
        yield item
        progress.advance()
    progress.finish()


class _LossyFile(io.FileIO):
    """A stream that takes everything, and drops what it cannot write."""

    def write(self, content: Any) -> int:
        """Write all of `content`, as far as anybody knows."""
        with contextlib.suppress(OSError):
            return super().write(content) or len(content)
        return len(content)


def outlive_terminal() -> None:
    """Let standard error drop what it cannot write: a terminal may be closed, or a log's disk full, and work goes on.

    Covers everything that this process writes there from Python: prints, tables, progress, warnings and Ray's threads.
    """
    # None if it was closed before the start: prints would go to standard output.
    descriptor = os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else sys.stderr.fileno()
    raw = _LossyFile(descriptor, "wb", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


def _log_to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _rate(value: float | None) -> str:
    return "" if value is None else f", {value:,.0f}/s" if value >= 10 else f", {value:.2g}/s"


def make_table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), right: Collection[int] = ()) -> Table:
    """Return a borderless rich table; see `format_table`."""
    rows = list(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(header), header_style="")
    for i in range(max(map(len, [header, *rows]))):
        heading = header[i] if i < len(header) else ""
        table.add_column(Text(heading), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def format_table(
    rows: Iterable[Sequence[str]],
    header: Sequence[str] = (),
    *,
    right: Collection[int] = (),
    width: int | None = None,
) -> str:
    """Return a table as lines, indented by two spaces.

    Args:
        rows: The cells; rows may have fewer of them than others.
        header: Headings of the columns; none by default.
        right: Columns that are aligned to the right.
        width: Most characters of a line; longer cells are continued below, never cut. By default the width of the
            terminal on standard error, and no limit where that is not a terminal.
    """
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stderr.isatty() else _UNLIMITED
    out = io.StringIO()
    console = Console(file=out, width=width - 2, color_system=None, force_terminal=False)
    console.print(make_table(rows, header, right))
    return "".join(f"  {line}".rstrip() + "\n" for line in out.getvalue().splitlines())


def byte_size(count: int) -> str:
    """Return bytes as `1.50 GiB` or `1.5 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def counted(number: float, noun: str) -> str:
    """Return `1 node` or `2 nodes`."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return seconds as `42s`, `3m05s` or `2h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def amount(value: float | None) -> str:
    """Write a count of parameters or operations: 1.25 M."""
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
