"""How an evaluation's numbers and names are written for readers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mowe_ray.evaluation.results import Interval

MINUS = "\u2212"
WORDS = {"lower": "lower is better", "higher": "higher is better"}


def score(value: float | None) -> str:
    """Write a score or a difference: 63.20."""
    if value is None or not math.isfinite(value):
        return "–"
    written = f"{value:.2f}"
    return written.lstrip("-") if float(written) == 0 else written


def signed(value: float) -> str:
    """Write a difference with its sign: +1.20."""
    written = score(value)
    return f"+{written}" if value > 0 and float(written) else written


def bounds(interval: Interval) -> str:
    """Write the 95 % interval: [60.10, 66.30]."""
    return f"[{score(interval.low)}, {score(interval.high)}]"


def typeset(number: str) -> str:
    """Give a written number the minus of print."""
    return number.replace("-", MINUS)


def listed(names: Sequence[str], most: int) -> str:
    """Write a list: "a, b and c", "a, b and 7 more"."""
    shown = [*names[: most - 1], f"{len(names) - most + 1} more"] if len(names) > most else list(names)
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def test_set_names(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Name each (dataset, task) as briefly as is clear: by its task where there is one dataset only."""
    unique = list(dict.fromkeys(pairs))
    one = len({dataset for dataset, _ in unique}) == 1
    return {pair: pair[1] if one else " · ".join(dict.fromkeys(pair)) for pair in unique}
