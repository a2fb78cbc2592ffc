"""Share of a corpus's bytes that its first index on S3 reads, and requests of a second head that starts with it.

The corpora are foreign tars, as no `prepare` has written them: one of clips of the usual size for the bytes, one of
many small tars for the requests. A local S3 server counts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import fsspec
import numpy as np
from measuring import Check, conclude

from mowe_ray.data.index import SourceSpec, build_index
from tests.s3_server import BUCKET, S3Server, make_bucket


def main() -> int:
    """Measure and print; returns 0 if the targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=100, help="clips of a tar (%(default)s)")
    parser.add_argument("--clip-kb", type=int, default=256, help="a clip, 12 s of FLAC (%(default)s)")
    parser.add_argument("--shards", type=int, default=1000, help="tars for the second head (%(default)s)")
    arguments = parser.parse_args()
    with S3Server() as server:
        os.environ.update(server.environment)
        make_bucket()
        corpus = put("long", 2, arguments.clips, arguments.clip_kb << 10)
        first = index("long", 2 * arguments.clips, server)
        put("many", arguments.shards, 2, 1000)
        index("many", 2 * arguments.shards, server)
        second = index("many", 2 * arguments.shards, server)
    table = {
        "first index": f"{first['bytes'] / 1e6:.2f} of {corpus / 1e6:.1f} MB, {first['requests']} requests",
        "second head": f"{second['requests']} requests, {second['lists']} of them LISTs",
    }
    checks = [
        Check("share of the bytes that the first index reads", first["bytes"] / corpus, 0.02),
        Check("GETs of a second head, LISTs too", second["requests"], arguments.shards / 1000 + 10),
    ]
    return conclude("scale/first_index", table, checks)


def put(folder: str, shards: int, clips: int, clip_bytes: int) -> int:
    """Write tars whose texts say how long their clips are; returns their bytes in all."""
    audio = np.random.default_rng(0).bytes(clip_bytes)
    contents = {f"{BUCKET}/{folder}/{shard:06d}.tar": tar(shard, clips, audio) for shard in range(shards)}
    fsspec.filesystem("s3").pipe(contents)
    return sum(map(len, contents.values()))


def tar(shard: int, clips: int, audio: bytes) -> bytes:
    """Return a tar of `clips` samples."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for clip in range(clips):
            key = f"{shard:06d}_{clip:06d}"
            text = json.dumps({"id": key, "text": "a sentence of some words", "duration": 12.0}).encode()
            for name, member in ((f"{key}.flac", audio), (f"{key}.json", text)):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                archive.addfile(info, io.BytesIO(member))
    return content.getvalue()


def index(folder: str, samples: int, server: S3Server) -> dict[str, int]:
    """Index a corpus as a machine without a cache; returns what that moved and asked for."""
    fsspec.filesystem("s3").invalidate_cache()
    bytes_before, requests_before = server.faults.bytes, len(server.faults.requests)
    with tempfile.TemporaryDirectory() as cache:
        found = build_index([SourceSpec("made", f"s3://{BUCKET}/{folder}", "asr")], cache, min_s=0.1, max_s=30.0)
    assert len(found) == samples
    requests = server.faults.requests[requests_before:]
    lists = sum("list-type" in request for request in requests)
    return {"bytes": server.faults.bytes - bytes_before, "requests": len(requests), "lists": lists}


if __name__ == "__main__":
    sys.exit(main())
