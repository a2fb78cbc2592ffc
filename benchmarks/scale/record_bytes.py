"""Bytes that the metrics of a run move to and from S3, over the number of records: the slope between logarithms.

A local S3 server counts them. 1.0 is what the records alone would take, 2.0 reading and writing the file for each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import Check, conclude

from mowe_ray.output.run_folder import RunFolder
from tests.s3_server import BUCKET, S3Server, make_bucket

RECORD = json.dumps({"kind": "train", "step": 1, "numbers": "x" * 500}) + "\n"


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[250, 1000, 4000], help="(default: %(default)s)")
    parser.add_argument("--at-a-time", type=int, default=10, help="records of a write (%(default)s)")
    arguments = parser.parse_args()
    moved = []
    with S3Server() as server:
        os.environ.update(server.environment)
        make_bucket()
        for records in arguments.records:
            before = server.faults.bytes
            folder = RunFolder(f"s3://{BUCKET}", f"run-{records}")
            folder.keep_lines_up_to("metrics.jsonl", 0)
            for _ in range(0, records, arguments.at_a_time):
                folder.append_text("metrics.jsonl", RECORD * arguments.at_a_time)
            assert len(folder.read_lines("metrics.jsonl")) == records
            moved.append(server.faults.bytes - before)
    table = {
        f"{records} records": f"{size / 1e6:.1f} MB" for records, size in zip(arguments.records, moved, strict=True)
    }
    slope = float(np.polyfit(np.log(arguments.records), np.log(moved), 1)[0])
    return conclude("scale/record_bytes", table, [Check("slope of bytes over records", slope, 1.05)])


if __name__ == "__main__":
    sys.exit(main())
