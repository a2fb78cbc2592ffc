"""How a study's entries, values and numbers are written for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mowe_ray.sweeping.schema import POOL_KEY

_SECTIONS = ("model", "data", "training", "compute")


def pool_label(names: Sequence[str]) -> str:
    """Write a pool: "no pool", "3 x whisper", "hubert + 2 x whisper"."""
    counts = {name: names.count(name) for name in names}
    parts = [name if count == 1 else f"{count} x {name}" for name, count in counts.items()]
    return " + ".join(parts) or "no pool"


def entry_label(value: Any) -> str:
    """Write the value of an entry; a list of names is a pool."""
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return pool_label(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def entry_name(name: str) -> str:
    """Write the name of an entry: "pool", or the key without its section."""
    section, _, rest = name.partition(".")
    return "pool" if name == POOL_KEY else rest if section in _SECTIONS and rest else name


def point_label(values: Mapping[str, Any]) -> str:
    """Write a point: the pool, then the other entries as `name = value`."""
    pool = [entry_label(values[POOL_KEY])] if POOL_KEY in values else []
    others = [f"{entry_name(name)} = {entry_label(value)}" for name, value in values.items() if name != POOL_KEY]
    return ", ".join([*pool, *others]) or "the base configuration"


def metric_label(metric: str) -> str:
    """Write an objective: "score", "loss", "score on er"."""
    return metric.replace("score.", "score on ", 1)


def number(value: float | None) -> str:
    """Write a score or loss."""
    return "–" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def plus_minus(value: float | None, error: float | None) -> str:
    """Write a number with its standard error, if there is one."""
    if error is None or value is None:
        return number(value)
    return f"{number(value)} ± {f'{error:.1g}' if 0 < error < 0.0005 else number(error)}"


def counts(numbers: Mapping[str, int]) -> str:
    """Write how many trials are in which state: "9 finished, 2 stopped early, 1 failed"."""
    words = {"stopped": "stopped early"}
    return ", ".join(f"{count} {words.get(status, status)}" for status, count in numbers.items() if count)
