"""Whatever ends a child process costs the call it was in."""

import os
import signal
from pathlib import Path

import pytest

from mowe_ray.data.child_process import ChildDied, ChildProcess, exit_reason
from mowe_ray.data.sample import BadAudio


def die_once(note: Path, number: int) -> int:
    if not note.exists():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def print_a_lot() -> None:
    os.write(1, b"x" * 1_000_000)
    os.write(2, b"x" * 1_000_000)


def refuse() -> None:
    raise BadAudio("silent", "peak 0")


class UnpicklableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def refuse_strangely() -> None:
    raise UnpicklableError(1, 2)


@pytest.mark.slow
def test_a_child_that_dies_is_replaced_and_tried_once_more(tmp_path):
    with ChildProcess() as child:
        first = child.call(os.getpid)
        assert first == child.call(os.getpid) != os.getpid()
        with pytest.raises(ChildDied, match="signal SIGABRT ended the process"):
            child.call(os.abort)
        assert child.call(die_once, tmp_path / "note", 7) == 7
        child.call(print_a_lot)
        assert len(child.call(bytes, 5_000_000)) == 5_000_000
        last = child.call(os.getpid)
    assert last != first
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


@pytest.mark.slow
def test_exceptions_cross_from_the_child_to_the_parent():
    with ChildProcess() as child:
        with pytest.raises(BadAudio) as raised:
            child.call(refuse)
        assert (raised.value.cause, raised.value.detail) == ("silent", "peak 0")
        with pytest.raises(RuntimeError, match="UnpicklableError: 1 and 2"):
            child.call(refuse_strangely)
        with pytest.raises(ValueError, match="abc"):
            child.call(int, "abc")


def test_a_child_that_cannot_start_is_no_fault_of_what_it_was_to_do(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with ChildProcess() as child, pytest.raises(RuntimeError, match="does not start: exit code 1"):
        child.call(os.getpid)


@pytest.mark.parametrize(("code", "reason"), [(3, "exit code 3"), (-11, "signal SIGSEGV"), (-40, "signal 40")])
def test_exit_codes_in_words(code, reason):
    assert exit_reason(code) == reason
