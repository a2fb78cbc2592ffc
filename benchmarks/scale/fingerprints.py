"""CPU seconds and requests of a driver to list shards on S3 and tell their versions: the slope over their number."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import fsspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import Check, conclude, cpu_seconds

from mowe_ray.data.shards import list_shards
from mowe_ray.data.shards.storage import fingerprints
from tests.s3_server import BUCKET, make_bucket, served


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 400, 1600], help="(default: %(default)s)")
    arguments = parser.parse_args()
    seconds, table = [], {}
    with served() as environment:
        os.environ.update(environment)
        make_bucket()
        for shards in arguments.shards:
            put_shards(shards)
            seconds.append(min(cpu_seconds(lambda n=shards: look(n)) for _ in range(3)))
            table[f"{shards} shards"] = f"{seconds[-1]:.3f} CPU s"
    slope = float(np.polyfit(np.log(arguments.shards), np.log(seconds), 1)[0])
    return conclude("scale/fingerprints", table, [Check("slope of CPU s over shards", slope, 1.1)])


def put_shards(number: int) -> None:
    """Write empty shards."""
    fs = fsspec.filesystem("s3")
    fs.pipe({f"{BUCKET}/{number}/{n:06d}.tar": b"x" for n in range(number)})


def look(number: int) -> None:
    """List the shards and their versions, as the index does."""
    found = fingerprints(list_shards(f"s3://{BUCKET}/{number}"))
    assert len(found) == number
    assert all(len(one) > 20 for one in found), "sizes alone do not tell versions"


if __name__ == "__main__":
    sys.exit(main())
