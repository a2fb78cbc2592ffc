"""The blocks a page is made of: sections, and tiles with a number each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mowe_ray.output.svg import escape, tag


def section(title: str, body: str, note: str = "") -> str:
    """Put markup under a heading, `title` and `note` being markup too; nothing at all without a body."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else "", body) if body else ""


def tiles(contents: Iterable[Sequence[str]]) -> str:
    """Write tiles of (number, lines below it ...)."""
    written = [
        tag("div", tag("b", escape(b)), *(tag("small", escape(line)) for line in lines)) for b, *lines in contents
    ]
    return tag("div", *written, class_="tiles")
