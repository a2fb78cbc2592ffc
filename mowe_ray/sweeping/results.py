"""Placeholder until the other branch is merged."""

from typing import Any


def point_label(values: dict[str, Any]) -> str:
    """Label."""
    return ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in values.items())
