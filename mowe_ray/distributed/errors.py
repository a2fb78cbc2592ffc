"""What went wrong, in a line: Ray's errors carry whole tracebacks as text."""

from __future__ import annotations

import ray
import ray.train


def last_line(error: BaseException) -> str:
    """Return what an error says, without the traceback that Ray puts before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def innermost_cause(error: Exception) -> str:
    """Return the last line of the innermost traceback, of the one of Ray Data and of our function."""
    return str(error).split("\n\nThe above exception")[0].strip().splitlines()[-1]


def causes(error: ray.train.TrainingFailedError) -> str:
    """Say in a few lines what went wrong on which rank, where Ray would print every rank's traceback, cut off."""
    if not isinstance(error, ray.train.WorkerGroupError) or not error.worker_failures:
        return str(error)
    logs = f"{ray.get_runtime_context().get_temp_dir()}/session_latest/logs/train"
    return f"{by_rank(error.worker_failures)}\n  full logs: {logs}, on the machine of the rank"


def by_rank(failures: dict[int, Exception]) -> str:
    """Return what failed on which ranks, a line each; equal failures share one."""
    ranks: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        # A failed Ray task carries its whole traceback as text, with the cause in the last line.
        told = (str(failure).strip().splitlines() or ["no message"])[-1]
        name = type(failure).__name__
        if name == "WorkerHealthCheckFailedError":  # it says who the worker was, in many lines
            told = name = "the process died"
        where = "".join(f" ({note})" for note in getattr(failure, "__notes__", [])[-1:])
        ranks.setdefault(f"{told if told.startswith(name) else f'{name}: {told}'}{where}", []).append(rank)
    lines = [f"rank {', '.join(map(str, who))}: {what}" for what, who in list(ranks.items())[:3]]
    return "\n  ".join(["", *lines])
