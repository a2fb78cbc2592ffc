"""Numbers with their units: durations, amounts and sizes."""

from __future__ import annotations


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
