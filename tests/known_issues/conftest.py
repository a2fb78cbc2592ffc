"""Fixtures that the unit tests have too."""

from tests.unit.conftest import make_micro_batch

__all__ = ["make_micro_batch"]
