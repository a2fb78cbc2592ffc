"""The collectives that reports need."""

from __future__ import annotations

from typing import Any, Protocol


class Ranks(Protocol):
    """The processes of a run, seen from one of them."""

    @property
    def rank(self) -> int:
        """Index of this rank."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank. Collective."""
