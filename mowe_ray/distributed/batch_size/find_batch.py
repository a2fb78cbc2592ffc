"""Find the largest micro-batch that fits one worker, by training on synthetic clips until memory ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray

from mowe_ray.config import RunConfig
from mowe_ray.distributed import cluster, resources
from mowe_ray.distributed.batch_size.memory_trial import Trials
from mowe_ray.distributed.batch_size.search import Largest, clip_lengths, recommended_batch_seconds

# Share of a machine's free memory that trials on the CPU may take.
_FREE_SHARE = 0.8


class Trial(NamedTuple):
    """One micro-batch of `clips` clips of `seconds` seconds.

    Attributes:
        failure: What could not be had of `limit_bytes`; None if it fits.
        most: The largest number of such clips that fits, once that is known.
    """

    seconds: float
    clips: int
    failure: str | None
    limit_bytes: int
    most: int | None


def find_batch(config: RunConfig, say: Callable[[str], None], limit_bytes: int | None = None) -> dict[str, Any]:
    """Measure how many clips of each length fit; returns what the command prints.

    Runs on one worker's resources of the cluster if RAY_ADDRESS is set, otherwise on this machine.

    Args:
        say: Shows a line to the person who waits.
        limit_bytes: Memory to use; None is all of the GPU's, or 80 % of what the machine has free.

    Raises:
        ValueError: A single clip does not fit, or the model cannot be built; the message names keys.
    """
    cap = config.data.max_batch_size
    say(f"largest micro-batch of one worker, ZeRO stage {config.compute.zero_stage} (more workers only free memory)")
    say(f"{'clip':>8}  {'most clips':>10}  {'batch_seconds':>13}")
    found: dict[float, int] = {}
    limit = 0
    search = _on_cluster if "RAY_ADDRESS" in os.environ else _search
    for trial in search(config, limit_bytes):
        limit = trial.limit_bytes
        outcome = "fits" if trial.failure is None else f"out of memory: {trial.failure}"
        say(f"{'':12}trying {trial.clips} x {trial.seconds:g} s: {outcome}")
        if trial.most is None:
            continue
        if trial.most == 0:
            raise ValueError(
                f"one clip of {trial.seconds:g} s does not fit into {limit / 2**30:.2f} GiB ({trial.failure}): lower "
                "data.max_duration_s, set model.gradient_checkpointing=[language_model] or compute.offload=cpu, or "
                "train fewer parts"
            )
        found[trial.seconds] = trial.most
        batch_seconds = f"{trial.most * trial.seconds:g}{' or more' if trial.most == cap else ''}"
        say(f"{trial.seconds:>6g} s  {trial.most:>10}  {batch_seconds:>13}")
    rows = [{"seconds": seconds, "clips": clips, "batch_seconds": seconds * clips} for seconds, clips in found.items()]
    return {"find_batch": rows, "batch_seconds": recommended_batch_seconds(found, cap), "limit_bytes": limit}


def _on_cluster(config: RunConfig, limit_bytes: int | None) -> Iterator[Trial]:
    """Search where a worker would run."""
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


def _search(config: RunConfig, limit_bytes: int | None) -> Iterator[Trial]:
    if config.compute.gpus_per_worker == 0 and limit_bytes is None:
        limit_bytes = round(_FREE_SHARE * _free_bytes())
    trials = Trials(config, limit_bytes)
    most, guess = config.data.max_batch_size, 1
    for seconds in clip_lengths(config.data.max_duration_s):
        search = Largest(most, guess)
        while not search.done:
            clips = search.number
            failure = trials.failure(clips, seconds)
            search.tell(failure is None)
            yield Trial(seconds, clips, failure, trials.limit_bytes, search.found if search.done else None)
        if not search.found:
            break
        most, guess = search.found, max(1, search.found // 2)  # the next clips are about twice as long
    trials.end()


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return available
