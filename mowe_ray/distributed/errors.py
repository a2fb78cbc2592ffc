"""Extract the root cause of a failure from the exceptions in which Ray wraps it."""

from __future__ import annotations

import re

import ray
from ray.exceptions import RayError, RayTaskError

# Between the exceptions of a chain, as Python prints them.
_CHAIN = re.compile(
    r"\n\n(?:The above exception was the direct cause of the following exception:"
    r"|During handling of the above exception, another exception occurred:)\n\n"
)
# The first line of a stack: Python's, or what Ray prints in its place.
_HEADER = re.compile(r"Traceback \(most recent call last\):|ray::.*\(pid=.*\)")
# Ray Data's own exceptions around those of the function that it has called.
_WRAPPERS = ("UserCodeException", "SystemException")
# This project raises these with a complete sentence for the user; the name of any other type is part of its message.
_SENTENCES = ("ValueError", "RuntimeError")


def cause_of(error: BaseException) -> str:
    """Returns the message of the exception that is behind `error`, without stacks and without Ray's own advice.

    Args:
        error: Any exception: one of ours, of Ray Core, Ray Data or Ray Train.

    Returns:
        All lines of the message, after the name of the exception's type where the message alone would not do.
    """
    # Ray Train's, recognised by their attributes: a process that only decodes does not import it.
    if failures := getattr(error, "worker_failures", None):
        return cause_of(failures[min(failures)])
    if (failure := getattr(error, "controller_failure", None)) is not None:
        return cause_of(failure)
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        return cause_of(error.cause)
    if isinstance(error, RayError):  # causes of causes do not travel between processes: only their text does
        return cause_in(str(error))
    return _described(type(error).__name__, str(error))


def cause_in(text: str) -> str:
    """Returns what `cause_of` would for a printed exception; a text without a traceback is a message."""
    exceptions = [cause for block in _CHAIN.split(text) if (cause := _exception_of(block)) is not None]
    # The last exception of a chain is the one that was raised; Ray Data's own do not contain the cause.
    causes = [cause for cause in exceptions if cause[0] not in _WRAPPERS] or exceptions
    if causes:
        return _described(*causes[-1])
    # After a tab come the identifiers of an actor that has died.
    return "\n".join(line for line in text.strip().splitlines() if not line.startswith("\t"))


def _exception_of(traceback: str) -> tuple[str, str] | None:
    """Returns type and message of the exception of a stack, of the innermost if its message is another's stack."""
    header = _HEADER.search(traceback)
    if header is None:
        return None
    # Frames are indented, the exception after them is not.
    after = re.search(r"^\S.*", traceback[header.end() :], re.MULTILINE | re.DOTALL)
    if after is None:
        return None
    line = after[0].partition("\n")[0]
    if _HEADER.search(line) and (inner := _exception_of(after[0])) is not None:
        return inner
    kind, _, message = after[0].partition(":") if re.match(r"[\w.]+(\([\w.]+\))?:", line) else (after[0], "", "")
    return kind.strip().rpartition(".")[2], message


def _described(kind: str, message: str) -> str:
    # PyTorch appends the stack of its C++ code.
    message = message.partition("\nException raised from ")[0].strip()
    if not message or kind in _SENTENCES:
        return message or kind
    return f"{kind}: {message}"


def format_training_failure(error: Exception) -> str:
    """Returns in a few lines what went wrong on which rank, where Ray would print every rank's stack, cut off."""
    failures: dict[int, Exception] | None = getattr(error, "worker_failures", None)
    if not failures:
        return cause_of(error)
    logs = f"{ray.get_runtime_context().get_temp_dir()}/session_latest/logs/train"
    return f"{format_failures(failures)}\n  full logs: {logs}, on the machine of the rank"


def format_failures(failures: dict[int, Exception]) -> str:
    """Returns the causes of at most three different failures, each after the ranks that it happened on."""
    ranks: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        # Ray's message only says which process it was, in many lines.
        died = type(failure).__name__ == "WorkerHealthCheckFailedError"
        cause = "the process died" if died else cause_of(failure)
        note = "".join(f" ({note})" for note in getattr(failure, "__notes__", [])[-1:])
        ranks.setdefault(f"{cause}{note}", []).append(rank)
    lines = [f"rank {', '.join(map(str, who))}: {cause}" for cause, who in list(ranks.items())[:3]]
    return "\n  ".join(["", *(line.replace("\n", "\n    ") for line in lines)])
