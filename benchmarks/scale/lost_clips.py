"""Clips that are lost, or taken for bad, while S3 refuses requests and breaks connections: a share of all reads.

For a while all of them fail, longer than clients try again by themselves. Tars and manifests are scanned and read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import fsspec
from measuring import Check, conclude

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.data.synthetic_corpus import builtin_samples
from tests.s3_server import BUCKET, S3Server, make_bucket

LIMITS = 0.1, 30.0


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=120, help="clips of each corpus (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.1, help="share of the reads that fail (%(default)s)")
    arguments = parser.parse_args()
    samples = list(builtin_samples("train", arguments.clips))
    table, lost = {}, 0
    with S3Server() as server:
        os.environ.update(server.environment)
        make_bucket()
        for kind, url in (("tar", write_tar(samples)), ("manifest", write_manifest(samples))):
            server.faults.only, server.faults.rate = rf"GET /{BUCKET}/.+\.\w+$", arguments.rate
            before = len(server.faults.requests)
            missing = read(url, samples, server)
            server.faults.rate = 0.0
            table[kind] = f"{missing} of {len(samples)} lost, {len(server.faults.requests) - before} requests"
            lost += missing
    return conclude("scale/lost_clips", table, [Check("clips lost to failed requests", lost, 0)])


def write_tar(samples: list[Sample]) -> str:
    """Write shards, and return where they are."""
    write_webdataset(iter(samples), f"s3://{BUCKET}/tar", shard_bytes=1 << 20)
    return f"s3://{BUCKET}/tar"


def write_manifest(samples: list[Sample]) -> str:
    """Write a manifest and its files, and return where it is."""
    fs = fsspec.filesystem("s3")
    fs.pipe({f"{BUCKET}/files/{n}.flac": sample.audio for n, sample in enumerate(samples)})
    rows = [{"id": s.id, "audio": f"{n}.flac", "text": s.answer, "task": s.task} for n, s in enumerate(samples)]
    fs.pipe_file(f"{BUCKET}/files/all.jsonl", "\n".join(map(json.dumps, rows)).encode())
    return f"s3://{BUCKET}/files/all.jsonl"


def read(url: str, samples: list[Sample], server: S3Server) -> int:
    """Scan and read a corpus; returns how many of the samples do not come."""
    with tempfile.TemporaryDirectory() as cache:
        index = build_index([SourceSpec("made", url)], cache, min_s=LIMITS[0], max_s=LIMITS[1])
        found: set[str] = set()
        for start in range(0, len(index), 16):
            if start == 16:
                server.faults.fail(60, 503)
            found.update(load_micro_batch(index.table.slice(start, 16), *LIMITS).ids)
    return len({sample.id for sample in samples} - found)


if __name__ == "__main__":
    sys.exit(main())
