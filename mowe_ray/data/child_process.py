"""Calls in a child process, for native code that may end the process it runs in.

Decoders and Arrow are written in C and C++: a file that nobody foresaw can make them end the process, which no `except`
catches. What is called here costs the child alone.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

Result = TypeVar("Result")

_SERVE = "from mowe_ray.data.child_process import serve; serve({})"


class ChildDied(Exception):  # noqa: N818 - what happened, to a process that was made for it
    """The child ended in the middle of a call; the message says by what."""


class ChildTimeout(ChildDied):
    """The child took too long, and was ended."""


class ChildProcess:
    """A child process that calls functions, one at a time; another one starts after one that has died.

    Not a `multiprocessing.Process`, whose child first imports the main module of its parent: in a Ray worker that is
    Ray's, and in a user's script without a guard it would run the script again.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def call(self, function: Callable[..., Result], *arguments: Any, timeout_s: float | None = None) -> Result:
        """Return what `function(*arguments)` returns in the child, or raise what it raises there.

        Args:
            function: Of a module, by whose name the child finds it.
            timeout_s: A child that takes longer is ended, in seconds; None waits.

        Raises:
            ChildDied: The child ended before it had the result, twice: once may be the fault of something else. Or
                it took too long, once.
        """
        try:
            return self._call(function, arguments, timeout_s)
        except ChildTimeout:
            raise
        except ChildDied:
            return self._call(function, arguments, timeout_s)

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _call(self, function: Callable[..., Result], arguments: tuple[Any, ...], timeout_s: float | None) -> Result:
        if self._process is None:
            self._start()
        assert self._process is not None
        try:
            self._connection.send((function, arguments))
            if timeout_s is not None and not self._connection.poll(timeout_s):
                self.close()
                raise ChildTimeout(f"it took more than {timeout_s:g} s")
            raised, result = self._connection.recv()
        except (EOFError, OSError):
            raise ChildDied(f"{exit_reason(self._wait())} ended the process") from None
        if raised:
            raise result
        return result  # type: ignore[no-any-return]

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:  # closed here, so that the child's death is the end of the stream
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE.format(theirs.fileno())],
                # A runtime environment of Ray changes the path, not the variable.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)},
                pass_fds=[theirs.fileno()],
                # What decoders print about a damaged file is not for the user.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C is for the parent: the child's death would be put down to its file
            )
        try:
            self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"a child process of Python does not start: {exit_reason(self._wait())}") from None

    def _wait(self) -> int:
        """Return the exit code of a child whose end of the connection is closed."""
        assert self._process is not None
        code = self._process.wait()
        self.close()
        return code


def serve(descriptor: int) -> None:
    """Answer calls until the parent ends; the child's main function.

    Args:
        descriptor: File descriptor of the connection.
    """
    connection: Connection[Any, Any] = Connection(descriptor)
    connection.send("ready")
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = False, function(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever the function raises is raised again in the parent
            answer = True, _portable(error)
        try:
            connection.send(answer)
        except ConnectionError:
            return


def _portable(error: Exception) -> Exception:
    """Return an exception that the parent can unpickle: of others only the text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - to unpickle calls the exception's own constructor, which may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def exit_reason(code: int) -> str:
    """Return how a process ended, by its exit code as `subprocess` gives it: negative after a signal."""
    try:
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:  # a real-time signal
        return f"signal {-code}"
