"""The console script: `mowe-ray COMMAND ...` is `python -m mowe_ray.COMMAND ...`.

mowe-ray train | sweep | evaluate | report | prepare | preflight | serve | ask | export | prune   [its arguments]
mowe-ray --version
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mowe_ray import __version__
from mowe_ray.shipped import shipped

COMMANDS = ("train", "sweep", "evaluate", "report", "prepare", "preflight", "serve", "ask", "export", "prune")
_USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Become the command that is named first, so that signals, exit codes and output are its own.

    Returns:
        0 after help or version, 2 when there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    match arguments:
        case ["--version" | "-V", *_]:
            sys.stdout.write(f"mowe-ray {__version__}\n")
            return 0
        case ["-h" | "--help", *_]:
            sys.stdout.write(_help())
            return 0
        case [command, *rest] if command in COMMANDS:
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, "-m", f"mowe_ray.{command}", *rest])
    named = f"there is no command {arguments[0]!r}" if arguments else "name a command"
    sys.stderr.write(f"mowe-ray: {named}: {', '.join(COMMANDS)}; mowe-ray COMMAND --help describes one\n")
    return _USAGE_ERROR


def _help() -> str:
    folders = "".join(f"{name}: {folder}\n" for name in ("sweeps", "cluster") if (folder := shipped(name)) is not None)
    return f"{__doc__}\n{folders}"


if __name__ == "__main__":
    sys.exit(main())
