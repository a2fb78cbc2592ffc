"""Where the studies and the files of clusters lie: beside the package in a checkout, inside of it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path | None:
    """Return the folder `sweeps` or `cluster`; None in an installation without it."""
    return next((folder for folder in (_PACKAGE / name, _PACKAGE.parent / name) if folder.is_dir()), None)
