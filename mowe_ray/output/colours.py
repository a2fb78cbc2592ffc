"""Colours of charts, and legends that say what they mean."""

from __future__ import annotations

from collections.abc import Iterable

from mowe_ray.output.svg import escape, tag

MOST_COLOURS = 7
PLAIN = "var(--muted)"


def colour(i: int) -> str:
    """Return the i-th of the colours that all readers can tell apart; grey after the last."""
    return f"var(--c{i})" if i < MOST_COLOURS else PLAIN


def shade(share: float) -> str:
    """Return a colour between the pale and the strong end of a scale, for a share of 0 to 1."""
    return f"color-mix(in oklab, var(--strong) {100 * share:.0f}%, var(--pale))"


def chips(labels: Iterable[tuple[str, str]], kind: str = "chips") -> str:
    """Write a legend of (colour, label)."""
    marks = [tag("span", tag("i", style=f"background:{c}"), escape(label)) for c, label in labels]
    return tag("p", *marks, class_=kind) if marks else ""
