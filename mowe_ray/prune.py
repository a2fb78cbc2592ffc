"""Remove from a feature cache what was written longest ago.

python -m mowe_ray.prune FOLDER_OR_URL --max-gb 500
python -m mowe_ray.prune FOLDER_OR_URL --max-days 30

FOLDER_OR_URL is a `data.feature_cache`. A run computes again what it misses when it starts; one that is reading from
the cache now ends, and says so. The last line on stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

from mowe_ray.command_line import SUCCESS, make_parser, print_result, reject
from mowe_ray.data.cached_shards import prune
from mowe_ray.data.shards.storage import local_path
from mowe_ray.output.terminal import outlive_terminal


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 on success, 2 when the request was wrong.
    """
    arguments = _parser().parse_args(argv)
    limits = {"--max-gb": arguments.max_gb, "--max-days": arguments.max_days}
    try:
        if all(limit is None for limit in limits.values()):
            raise ValueError("give --max-gb, --max-days, or both")
        if wrong := [name for name, limit in limits.items() if limit is not None and not limit >= 0]:
            raise ValueError(f"{wrong[0]} must not be negative")
        removed, freed = prune(
            local_path(arguments.cache),
            max_bytes=None if arguments.max_gb is None else arguments.max_gb * 1e9,
            max_age_s=None if arguments.max_days is None else arguments.max_days * 86_400,
        )
    except ValueError as error:
        return reject(error)
    return print_result({"cache": arguments.cache, "removed": removed, "freed_gb": round(freed / 1e9, 3)}, SUCCESS, out)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("prune", __doc__, "")
    parser.add_argument("cache", metavar="FOLDER_OR_URL", help="a data.feature_cache")
    parser.add_argument("--max-gb", type=float, metavar="GB", help="how much may be left, of 10^9 bytes")
    parser.add_argument("--max-days", type=float, metavar="DAYS", help="what was written earlier goes")
    return parser


if __name__ == "__main__":
    outlive_terminal()
    sys.exit(main())
