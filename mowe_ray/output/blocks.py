"""The blocks a page is made of: sections, and tiles with a number each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mowe_ray.output.svg import escape, tag


def section(title: str, body: str, note: str = "") -> str:
    """Put markup under a heading, `title` and `note` being markup too; nothing at all without a body."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else "", body) if body else ""


def folded(figures: Sequence[str], most: int, kind: str) -> str:
    """Put figures into a grid of a kind, `two` or `three` across, those after the first `most` folded away."""
    if not figures:
        return ""
    grid, rest = tag("div", *figures[:most], class_=kind), figures[most:]
    return grid + (tag("details", tag("summary", f"{len(rest)} more"), tag("div", *rest, class_=kind)) if rest else "")


def tiles(contents: Iterable[Sequence[str]]) -> str:
    """Write tiles of (number, lines below it ...)."""
    written = [
        tag("div", tag("b", escape(b)), *(tag("small", escape(line)) for line in lines)) for b, *lines in contents
    ]
    return tag("div", *written, class_="tiles")
