"""`--find-batch`: find the largest micro-batch that fits one worker, by training on synthetic clips."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray

from mowe_ray.config import RunConfig
from mowe_ray.distributed import cluster, resources
from mowe_ray.output.terminal import format_table

# Share of a machine's free memory that trials on the CPU may take.
_FREE_SHARE = 0.8
_CLIP_S = (2.5, 5.0, 10.0, 20.0, 30.0)
_SAFETY = 0.9  # routers may come to choose larger members than in the trials


class MemoryTrial(NamedTuple):
    """The outcome of training on micro-batches of `clips` clips of `seconds` seconds.

    Attributes:
        failure: The allocation, out of `limit_bytes`, that failed; None if the micro-batch fits.
        largest: Largest number of such clips that fits; None as long as the search for it goes on.
    """

    seconds: float
    clips: int
    failure: str | None
    limit_bytes: int
    largest: int | None


def find_batch(config: RunConfig, log: Callable[[str], None], limit_bytes: int | None = None) -> dict[str, Any]:
    """Measures how many clips of each length fit; returns what the command prints.

    Runs on one worker's resources of the cluster if RAY_ADDRESS is set, otherwise on this machine.

    Args:
        log: Called with each line of progress.
        limit_bytes: Memory to use; None is all of the GPU's, or 80 % of what the machine has free.

    Raises:
        ValueError: A single clip does not fit, or the model cannot be built; the message names keys.
    """
    cap = config.data.max_batch_size
    log(f"largest micro-batch of one worker, ZeRO stage {config.compute.zero_stage} (more workers only free memory)")
    clips: dict[float, int] = {}
    limit = 0
    search = _on_cluster if "RAY_ADDRESS" in os.environ else _search
    for trial in search(config, limit_bytes):
        limit = trial.limit_bytes
        outcome = "fits" if trial.failure is None else f"out of memory: {trial.failure}"
        log(f"trying {trial.clips} x {trial.seconds:g} s: {outcome}")
        if trial.largest is None:
            continue
        if trial.largest == 0:
            raise ValueError(
                f"one clip of {trial.seconds:g} s does not fit into {limit / 2**30:.2f} GiB ({trial.failure}): lower "
                "data.max_duration_s, set model.gradient_checkpointing=[language_model] or compute.offload=cpu, or "
                "train fewer parts"
            )
        clips[trial.seconds] = trial.largest
    rows = [
        {"seconds": seconds, "clips": number, "batch_seconds": seconds * number} for seconds, number in clips.items()
    ]
    table = [
        [f"{seconds:g} s", str(number), f"{seconds * number:g}{' or more' if number == cap else ''}"]
        for seconds, number in clips.items()
    ]
    log(format_table(table, ["clip", "most clips", "batch_seconds"], right={0, 1, 2}).rstrip("\n"))
    return {"find_batch": rows, "batch_seconds": recommended_batch_seconds(clips, cap), "limit_bytes": limit}


def _on_cluster(config: RunConfig, limit_bytes: int | None) -> Iterator[MemoryTrial]:
    """Searches where a worker would run."""
    compute = config.compute
    cluster.join(compute.cpus_per_worker)
    bundle = resources.worker_bundle(compute)  # synthetic clips need no decoding
    resources.check_resources(bundle)
    task = ray.remote(_search).options(max_retries=0, **resources.ray_options(bundle))
    for trial in task.remote(config, limit_bytes):
        try:
            yield ray.get(trial)
        except ray.exceptions.RayTaskError as error:  # without the traceback of the task in its message
            raise error.cause from error


def _search(config: RunConfig, limit_bytes: int | None) -> Iterator[MemoryTrial]:
    # Here, because the driver of a search on a cluster needs neither the model nor DeepSpeed.
    from mowe_ray.distributed.batch_size.memory_trial import TrialProcess

    if config.compute.gpus_per_worker == 0 and limit_bytes is None:
        # On CPUs nothing else sets a limit before the machine swaps or the system kills processes.
        limit_bytes = round(_FREE_SHARE * _free_bytes())
    # One process for all trials that fit: to build the model takes longer than a step.
    process = TrialProcess(config, limit_bytes)
    upper, guess = config.data.max_batch_size, 1
    for seconds in clip_lengths(config.data.max_duration_s):
        search = BisectionSearch(upper, guess)
        while not search.done:
            clips = search.candidate
            failure = process.run(clips, seconds)
            search.update(fits=failure is None)
            largest = search.best if search.done else None
            yield MemoryTrial(seconds, clips, failure, process.limit_bytes, largest)
        if not search.best:
            break
        upper, guess = search.best, max(1, search.best // 2)  # the next clips are about twice as long
    process.end()


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return available


def clip_lengths(max_duration_s: float) -> list[float]:
    """Returns the clip lengths to try, in seconds and rising; the last is `max_duration_s`."""
    return [seconds for seconds in _CLIP_S if seconds < max_duration_s] + [max_duration_s]


class BisectionSearch:
    """Finds the largest number in 1..upper that fits, given that every smaller one does: by doubling, then bisection.

    Attributes:
        candidate: Number to try next, while `done` is false.
        best: Largest number that fitted so far; 0 if none did.
    """

    def __init__(self, upper: int, guess: int = 1):
        """Start from `guess`: the closer, the fewer trials."""
        assert upper >= 1
        self._upper, self.best, self._too_large = upper, 0, upper + 1
        self.candidate = min(max(guess, 1), upper)

    @property
    def done(self) -> bool:
        """Whether no number is left to try."""
        return self._too_large - self.best == 1

    def update(self, *, fits: bool) -> None:
        """Records whether `candidate` fitted, and chooses the next one."""
        if fits:
            self.best = self.candidate
        else:
            self._too_large = self.candidate
        doubled, middle = min(2 * self.best, self._upper), (self.best + self._too_large) // 2
        self.candidate = doubled if self._too_large > self._upper else middle


def recommended_batch_seconds(clips: dict[float, int], max_batch_size: int) -> float:
    """Returns a value for data.batch_seconds under which every micro-batch of the plan fits.

    Args:
        clips: Largest number of clips that fits, by their length in seconds; not empty, and at least 1 everywhere.
        max_batch_size: Largest number that was tried. Where it fits, memory sets no limit.

    Returns:
        0.9 of the smallest limit that memory sets, or of the most that was tried if it sets none. Never less than the
        longest clip, which data.batch_seconds has to hold.
    """
    limited = [seconds * number for seconds, number in clips.items() if number < max_batch_size]
    # Padding is to the longest clip, so that a limit at any length holds for all.
    smallest = min(limited) if limited else max(clips) * clips[max(clips)]
    return max(math.floor(10 * _SAFETY * smallest) / 10, max(clips))
