"""Memory of a long run: the slope of every process that lives as long as the run, over hours of small steps.

The quickstart trains with frequent validations and checkpoints: an hour has as many of them as a week of a real run.
Every few seconds the memory that each process has for itself (USS: what its end would give back) is read. A leak is a
slope: least squares over the second half, its standard error from blocks of a tenth, since neighbouring readings agree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
from measuring import Check, conclude

_EVERY_S = 5.0
_BLOCKS = 10
_LIMIT_MIB_PER_H = 40.0  # a day of it is a gigabyte, which a worker of a real model does not notice
_RUN = (
    "compute.num_workers=2",
    "training.epochs=100000",
    "training.log_every=10",
    "training.save_every=50",
    "training.eval_every=200",
)
_LASTING = (
    "ray::RayTrainWorker",
    "ray::TrainController",
    "mowe_ray.train",
    "raylet",
    "gcs_server",
    "ray::RunCoordinator",
)
Readings = dict[str, list[tuple[float, float]]]


def main() -> int:
    """Measure and print; returns 0 if no process grows faster than the limit, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120, help="how long to train (%(default)s)")
    parser.add_argument("override", nargs="*", help="keys of the run, as section.key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as storage:
        readings = watch(Path(storage), arguments.override, 60 * arguments.minutes)
        lines = (Path(storage) / "memory" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    slopes = {name: slope(values) for name, values in readings.items()}
    sizes = {name: np.median([mib for _, mib in values]) for name, values in readings.items()}
    table = {
        name: f"{sizes[name]:7.0f} MiB, {grows:+7.1f} ± {error:.1f} MiB an hour"
        for name, (grows, error) in slopes.items()
    }
    table["steps"] = f"{steps[-1]['step']:7d}"
    workers = [grows for name, (grows, _) in slopes.items() if "RayTrainWorker" in name]
    check = Check("MiB an hour, the worker that grows most", max(workers), _LIMIT_MIB_PER_H)
    return conclude("memory", table, [check], slopes=slopes, mib=sizes, steps=steps[-1]["step"])


def watch(storage: Path, overrides: list[str], seconds: float) -> Readings:
    """Train for a while; returns (hours, MiB) of the processes that lived longest, by title and pid."""
    command = [sys.executable, "-m", "mowe_ray.train", "--config", "quickstart", "name=memory", f"storage={storage}"]
    readings: Readings = defaultdict(list)
    with (storage / "log").open("w") as log:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        run = psutil.Popen([*command, *_RUN, *overrides], stdout=log, stderr=log, env=environment)
        try:
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                if run.poll() is not None:
                    raise RuntimeError(f"the run ended:\n{(storage / 'log').read_text()[-2000:]}")
                for name, mib in _sizes(run).items():
                    readings[name].append(((time.monotonic() - began) / 3600, mib))
                time.sleep(_EVERY_S)
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait(120)
    # A run that lost its workers has gone on with others: of each kind, what lived longest.
    longest = {name.split()[0]: 0 for name in readings}
    for name, values in readings.items():
        longest[name.split()[0]] = max(longest[name.split()[0]], len(values))
    return {name: values for name, values in readings.items() if len(values) > 0.8 * longest[name.split()[0]]}


def slope(values: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the growth in MiB an hour over the second half of `values`, and its standard error.

    The error is the delete-one-block jackknife's over `_BLOCKS` contiguous blocks.
    """
    later = np.array(values[len(values) // 2 :])
    whole = float(np.polyfit(later[:, 0], later[:, 1], 1)[0])
    blocks = np.array_split(np.arange(len(later)), _BLOCKS)
    left = [np.polyfit(*np.delete(later, block, axis=0).T, 1)[0] for block in blocks]
    error = math.sqrt((_BLOCKS - 1) / _BLOCKS * sum((one - np.mean(left)) ** 2 for one in left))
    return round(whole, 2), round(error, 2)


def _sizes(run: psutil.Popen) -> dict[str, float]:
    sizes = {}
    for process in [run, *run.children(recursive=True)]:
        try:
            title = " ".join(process.cmdline())
            name = next((name for name in _LASTING if name in title), None)
            if name is not None:
                sizes[f"{name} {process.pid}"] = process.memory_full_info().uss / 2**20
        except psutil.Error:  # it has ended
            continue
    return sizes


if __name__ == "__main__":
    sys.exit(main())
