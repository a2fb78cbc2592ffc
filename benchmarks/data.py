"""Decoding with Ray Data as training does it, against a plain torch DataLoader on the same cores.

Both decode the same micro-batches of 10 s FLAC clips from the same tar shards with the same decoder, and hand
them to one consumer. Then the memory the pipeline takes at its peak, for a corpus and for one four times as large.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import mowe_ray.distributed  # noqa: F401  # isort: skip  (first: it sets what Ray reads while it is imported)
import numpy as np
import psutil
import ray
import soundfile
import torch
from measuring import Check, conclude, interleave, ratio
from torch.utils.data import DataLoader, Dataset

from mowe_ray.data.epoch_plan import plan_epoch
from mowe_ray.data.index import Index, SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.distributed import cluster
from mowe_ray.distributed.ray_data.pipeline import decode_stream

CLIP_S = 10
LIMITS = {"min_s": 0.1, "max_s": 30.0}
_DISTINCT_CLIPS = 240  # a larger corpus repeats their shards under other names
_SHARD_CLIPS = 60


def main() -> int:
    """Measure and print; returns 0 if all targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=2400, help="10 s clips each side decodes per round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    parser.add_argument("--cores", type=int, default=min(2, os.cpu_count() or 1), help="decoding CPUs (%(default)s)")
    parser.add_argument("--memory-clips", type=int, default=1200, help="size of the smaller corpus (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder to keep the corpus in (a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as temporary:
        folder = arguments.data or Path(temporary)
        memory = [
            _in_new_process(peak_memory, make_index(folder, clips), arguments.cores)
            for clips in (arguments.memory_clips, 4 * arguments.memory_clips)
        ]
        index = make_index(folder, arguments.clips)
        cluster.join(arguments.cores)
        stored = ray.put(index)
        warm_up(stored, index, arguments.cores)
        first: dict[str, list[float]] = {"ray": [], "dataloader": []}

        def measure(name: str) -> float:
            batches = (
                ray_batches(stored, index, arguments.cores) if name == "ray" else loader_batches(index, arguments.cores)
            )
            to_first, speed = audio_seconds_per_second(batches)
            first[name].append(to_first)
            return speed

        speeds = interleave({name: lambda name=name: measure(name) for name in first}, arguments.rounds)
        ray.shutdown()
    table = {
        name: f"{np.median(speeds[name]):8.0f} audio-s/s, first batch after {np.median(first[name]):.2f} s"
        for name in first
    }
    for scale, peak in zip((1, 4), memory, strict=True):
        table[f"peak memory, {scale * arguments.memory_clips} clips"] = f"{peak / 2**20:8.0f} MiB"
    checks = [
        Check("throughput, Ray Data / DataLoader", ratio(speeds["ray"], speeds["dataloader"]), 0.9, at_most=False),
        Check("peak memory, four times the corpus", memory[1] / memory[0], 1.15),
    ]
    return conclude("data", table, checks, cores=arguments.cores, clips=arguments.clips, rounds=speeds)


def make_index(folder: Path, clips: int) -> Index:
    """Index a corpus of so many clips; shards beyond the distinct ones are links to them."""
    distinct = folder / "distinct"
    if not distinct.exists():
        write_webdataset(_samples(), str(distinct), shard_bytes=_SHARD_CLIPS * 300_000)
    shards = sorted(distinct.glob("*.tar"))
    corpus = folder / f"corpus-{clips}"
    corpus.mkdir(exist_ok=True)
    for number in range(-(-clips // _DISTINCT_CLIPS) * len(shards)):
        link = corpus / f"{number:05d}.tar"
        if not link.exists():
            link.hardlink_to(shards[number % len(shards)])
    whole = build_index([SourceSpec("benchmark", str(corpus), "ac")], folder / "cache", **LIMITS)
    return Index(whole.table.slice(0, clips), whole.source_names, whole.bad)


def _samples() -> Iterator[Sample]:
    """Yield tones in noise, which FLAC packs about as well as speech in a room (24 kB per second)."""
    rng = np.random.default_rng(0)
    time_s = np.arange(CLIP_S * 16_000) / 16_000
    for number in range(_DISTINCT_CLIPS):
        pitches = rng.uniform(100, 2000, 4)
        wave = 0.1 * np.sin(2 * np.pi * pitches[:, None] * time_s).sum(0) + 0.05 * rng.standard_normal(len(time_s))
        file = io.BytesIO()
        soundfile.write(file, np.clip(wave, -1, 1), 16_000, format="FLAC")
        yield Sample(str(number), file.getvalue(), "What do you hear?", "tones", "ac", "benchmark", "flac")


def micro_batches(index: Index) -> list[np.ndarray]:
    """Return the rows of each micro-batch of an epoch: 12 clips, shuffled as in training."""
    plan = plan_epoch(
        index.durations, index.runs, [1.0],
        seed=0, epoch=0, lanes=1, batch_seconds=12.5 * CLIP_S, max_batch_size=32, shuffle_buffer=10_000,
    )  # fmt: skip
    return [rows for step in plan for rows in step]


def ray_batches(stored: ray.ObjectRef, index: Index, cores: int) -> Iterator[np.ndarray]:
    """Yield the audio of each micro-batch, by the product's pipeline."""
    stream = decode_stream(
        stored, micro_batches(index), min_duration_s=LIMITS["min_s"], max_duration_s=LIMITS["max_s"], decode_cpus=cores
    )
    for batch in stream:
        yield batch.audio


def warm_up(stored: ray.ObjectRef, index: Index, cores: int) -> None:
    """Start Ray's worker processes, which a training run does once."""
    for _ in itertools.islice(ray_batches(stored, index, cores), 20):
        pass


class _MicroBatches(Dataset[tuple[torch.Tensor, dict[str, object]]]):
    """Each item a whole decoded micro-batch; its audio is a tensor, which workers hand over in shared memory."""

    def __init__(self, index: Index):
        self._index, self._rows = index, micro_batches(index)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, dict[str, object]]:
        batch = load_micro_batch(self._index.table.take(self._rows[number]), **LIMITS)
        return torch.from_numpy(batch.audio), {**vars(batch), "audio": None}


def loader_batches(index: Index, cores: int) -> Iterator[np.ndarray]:
    """Yield the audio of each micro-batch, by a plain DataLoader."""
    for audio, _ in DataLoader(_MicroBatches(index), batch_size=None, num_workers=cores):
        yield audio.numpy()


def audio_seconds_per_second(batches: Iterable[np.ndarray]) -> tuple[float, float]:
    """Consume all; returns seconds to the first batch, and the speed after the first tenth of the audio."""
    began = time.perf_counter()
    arrivals, samples = [], []
    for audio in batches:
        audio.max()  # read it once, as a model would
        arrivals.append(time.perf_counter() - began)
        samples.append(len(audio))
    skipped = len(samples) // 10
    return arrivals[0], sum(samples[skipped + 1 :]) / 16_000 / (arrivals[-1] - arrivals[skipped])


def peak_memory(index: Index, cores: int) -> int:
    """Stream an epoch and return the bytes that consumer, workers, Ray's services and object store took at most."""
    cluster.join(cores)
    stored = ray.put(index)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        me = psutil.Process()
        while not done.wait(0.25):
            peak = max(peak, sum(_memory(process) for process in [me, *me.children(recursive=True)]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for audio in ray_batches(stored, index, cores):
        audio.max()
    done.set()
    watcher.join()
    ray.shutdown()
    return peak


def _memory(process: psutil.Process) -> int:
    """Proportional set size: memory shared by n processes, like the object store, counts 1/n in each."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has ended
        return 0


def _in_new_process(function: Callable[[Index, int], int], *arguments: object) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    sys.exit(main())
