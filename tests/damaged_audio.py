"""Audio files of every format with wrong bytes, through scan and decoding, in a process that may die of them.

    python -m tests.damaged_audio SEED FIRST COUNT TIMEOUT_S

prints a JSON line before each file and one after it; `run` starts the process again behind a file that ended it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.audio_files import FFMPEG, SNDFILE, by_ffmpeg, by_sndfile

_KINDS = [*((by_sndfile, kind) for kind in SNDFILE), *((by_ffmpeg, kind) for kind in FFMPEG)]
_STEREO = {("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("mp4", "aac", 16_000)}
_HEAD_BYTES = 300


@dataclass
class Outcomes:
    """What became of damaged files.

    Attributes:
        counts: Files by cause; "good" are those that were decoded nevertheless.
        slowest_s: Of scan and decoding of one file.
        peak_bytes: Resident memory of the process that had the most.
        ended: Number and exit code of each file that ended the process.
        crashed: Number and message of each file whose exception no check foresees.
    """

    counts: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""
    peak_bytes: int = 0
    ended: list[tuple[str, int]] = field(default_factory=list)
    crashed: list[tuple[str, str]] = field(default_factory=list)


def run(count: int, *, seed: int, timeout_s: int) -> Outcomes:
    """Damage `count` files and return what became of them; one that takes longer than `timeout_s` ends its process."""
    outcomes, first = Outcomes(), 0
    while first < count:
        command = [sys.executable, "-m", "tests.damaged_audio", *map(str, (seed, first, count - first, timeout_s))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            name = _follow(process, outcomes)
            code = process.wait()
        if name is None:
            break
        outcomes.ended.append((name, code))
        outcomes.counts["ended the process"] += 1
        first = int(name.split()[0]) + 1
    return outcomes


def _follow(process: subprocess.Popen[str], outcomes: Outcomes) -> str | None:
    """Read the lines of a process to its end; returns the file that it was at, None if it had finished."""
    assert process.stdout is not None
    name: str | None = "0 nothing"
    for line in process.stdout:
        record = json.loads(line)
        if "done" in record:
            return None
        if "begins" in record:
            name = record["begins"]
            continue
        assert name is not None
        outcomes.counts[record["cause"]] += 1
        outcomes.peak_bytes = max(outcomes.peak_bytes, record["peak_bytes"])
        if record["seconds"] > outcomes.slowest_s:
            outcomes.slowest_s, outcomes.slowest = record["seconds"], name
        if record["cause"] == "crashed":
            outcomes.crashed.append((name, record["detail"]))
    return name


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a file with one to eight wrong bytes, half of them in its header; some are cut or have a hole, too."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        end = min(_HEAD_BYTES, len(data)) if rng.random() < 0.5 else len(data)
        data[int(rng.integers(end))] = int(rng.choice([0, 255, 127, 128, rng.integers(256)]))
    kind, at = rng.random(), int(rng.integers(len(data)))
    if kind < 0.1:
        del data[at:]
    elif kind < 0.2:
        del data[at : at + int(rng.integers(1, 2000))]
    return bytes(data)


def _work(seed: int, first: int, count: int, timeout_s: int) -> None:
    from mowe_ray.data.micro_batch import load_micro_batch
    from mowe_ray.data.shards import scan_shard

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # decoders print to standard output, too

    def send(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=out, flush=True)

    made: dict[tuple[int, int], bytes] = {}
    with tempfile.TemporaryDirectory() as temporary:
        file, manifest = Path(temporary) / "x", Path(temporary) / "m.jsonl"
        manifest.write_text('{"audio": "x", "text": "hello", "id": "x"}\n')
        file.write_bytes(by_sndfile("WAV", "PCM_16"))
        assert _scan_and_decode(str(manifest), scan_shard, load_micro_batch) == ("good", "")  # imports take time
        for number in range(first, first + count):
            rng = np.random.default_rng((seed, number))
            which = number % len(_KINDS)
            encode, kind = _KINDS[which]
            channels = 2 if kind in _STEREO and rng.random() < 0.5 else 1
            if (which, channels) not in made:
                made[which, channels] = encode(*kind, channels=channels, seconds=1.0)
            file.write_bytes(damaged(made[which, channels], rng))
            send({"begins": f"{number} {'-'.join(map(str, kind))}"})
            faulthandler.dump_traceback_later(timeout_s, exit=True)  # also where a decoder does not come back
            start = time.perf_counter()
            cause, detail = _scan_and_decode(str(manifest), scan_shard, load_micro_batch)
            seconds = time.perf_counter() - start
            faulthandler.cancel_dump_traceback_later()
            record = {"cause": cause, "detail": detail, "seconds": seconds, "peak_bytes": _peak_bytes()}
            send(record)
    send({"done": True})


def _peak_bytes() -> int:
    """Return the most memory this process has held: unlike `ru_maxrss`, not what the one that started it held then."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (peak,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return 1024 * peak


def _scan_and_decode(manifest: str, scan_shard, load_micro_batch) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    rows = scan_shard(manifest)
    if rows["cause"][0].as_py():
        return rows["cause"][0].as_py(), rows["detail"][0].as_py()
    one = pa.array([manifest])
    batch = load_micro_batch(rows.append_column("shard", one).append_column("source", one), 0.1, 30.0)
    return (batch.bad[0].cause, batch.bad[0].detail) if batch.bad else ("good", "")


if __name__ == "__main__":
    _work(*map(int, sys.argv[1:]))
