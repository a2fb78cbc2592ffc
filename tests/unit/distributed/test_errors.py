"""The cause of a failure, from real exceptions of Ray and from texts that Ray 2.60 printed on a cluster."""

import traceback

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError, UserCodeException
from ray.train import ControllerError, WorkerGroupError

from mowe_ray.distributed.errors import cause_in, cause_of, format_failures

MANY_LINES = "GenerationConfig is invalid:\n- `temperature`: `do_sample` is not set.\n\nFix these issues."
HINT = (
    "UDF failed to process a data block.\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\n"
    "To change retry attempts, configure `ray.data.DataContext.get_current()`."
)


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


def task_error(error: Exception, name: str = "task") -> RayTaskError:
    """The error of a Ray task that raised `error`, as `ray.get` raises it."""
    text = "".join(traceback.format_exception(error))
    return RayTaskError(name, text, error, proctitle=f"ray::{name}", pid=1, ip="1.2.3.4").as_instanceof_cause()


def data_error(error: Exception) -> RayTaskError:
    """The error of a Ray Data map over a function that raised `error`; `.cause` is Ray's hint, chains do not travel."""
    text = "".join(traceback.format_exception(raised(UserCodeException(HINT), error)))
    return RayTaskError("Map", text, UserCodeException(HINT), proctitle="ray::Map", pid=1, ip="1.2.3.4")


def test_messages_of_several_lines_are_complete() -> None:
    for error in (ValueError(MANY_LINES), RuntimeError(MANY_LINES)):
        assert cause_of(error) == MANY_LINES
        assert cause_of(task_error(raised(error))) == MANY_LINES
        assert cause_of(task_error(task_error(raised(error)))) == MANY_LINES


def test_a_failed_data_task_gives_its_reason_not_the_hint_of_ray() -> None:
    """Ray 2.60 ends the error with advice on retries, which a user once read in place of the reason."""
    error = data_error(raised(ValueError(MANY_LINES), KeyError("x")))
    assert "To change retry attempts" in str(error)
    assert cause_of(error) == MANY_LINES
    assert cause_of(task_error(error, "pipeline")) == MANY_LINES  # the task that ran the pipeline


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (KeyError("rate"), "KeyError: 'rate'"),
        (RuntimeError(), "RuntimeError"),
        (AssertionError(), "AssertionError"),
        (FileNotFoundError(2, "No such file", "/x"), "FileNotFoundError: [Errno 2] No such file: '/x'"),
        (GetTimeoutError("not within 3 s"), "not within 3 s"),
        (
            RuntimeError("CUDA error\nException raised from f at x.cpp:1 (most recent call first):\nframe #0"),
            "CUDA error",
        ),
    ],
)
def test_the_type_is_named_where_its_message_alone_would_not_do(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause
    if not isinstance(error, GetTimeoutError):
        assert cause_of(data_error(raised(error))) == cause


def test_an_actor_that_could_not_start() -> None:
    text = "".join(traceback.format_exception(raised(ValueError(MANY_LINES))))
    error = RayTaskError("A", text, ValueError(MANY_LINES), proctitle="ray::A.__init__", pid=1, ip="1.2.3.4")
    assert cause_of(ActorDiedError(error)) == MANY_LINES
    assert cause_of(task_error(raised(ActorDiedError(error)))) == MANY_LINES


def test_an_actor_that_died_without_an_exception() -> None:
    text = "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 3\nThe node has died."
    assert cause_in(text) == "The actor died unexpectedly before finishing this task.\nThe node has died."


def test_a_message_that_holds_a_stack_is_complete() -> None:
    """The watchdog's alarms show where a rank was."""
    message = 'rank 1 hangs:\nTraceback (most recent call last):\n  File "a.py", line 1, in f\nin backward'
    assert cause_of(task_error(raised(RuntimeError(message)))) == message
    printed = cause_of(data_error(raised(RuntimeError(message))))  # where Ray edits the inner stack's header
    assert printed.startswith("rank 1 hangs:\n")
    assert printed.endswith("in backward")


def test_of_training_workers() -> None:
    group = WorkerGroupError(
        "the workers failed", {1: ValueError("one"), 0: task_error(raised(ValueError(MANY_LINES)))}
    )
    assert cause_of(group) == MANY_LINES
    assert cause_of(ControllerError(group)) == MANY_LINES


def test_equal_failures_share_a_line_and_three_are_shown() -> None:
    noted = ValueError("cut off")
    noted.add_note("loop.py:7")
    errors = [ValueError("a\nb"), noted, ValueError("a\nb"), ValueError("c"), ValueError("d")]
    assert format_failures(dict(enumerate(errors))) == (
        "\n  rank 0, 2: a\n    b\n  rank 1: cut off (loop.py:7)\n  rank 3: c"
    )


# What `ray.get` of a task that ran a Ray Data pipeline printed, shortened.
PIPELINE = """\x1b[36mray::run()\x1b[39m (pid=27763, ip=192.0.2.2)
    for b in d.iter_batches(batch_size=None):
  File "/ray/data/iterator.py", line 254, in _create_iterator
    ) = self._to_ref_bundle_iterator()
        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ray.exceptions.RayTaskError(UserCodeException): \x1b[36mray::MapBatches(decode)()\x1b[39m (pid=27852, ip=192.0.2.2)
KeyError: 'x'

The above exception was the direct cause of the following exception:

\x1b[36mray::MapBatches(decode)()\x1b[39m (pid=27852, ip=192.0.2.2)
  File "/p.py", line 13, in decode
    raise ValueError("shard cut off") from e
ValueError: shard cut off:
- line two `a`

last line

The above exception was the direct cause of the following exception:

\x1b[36mray::MapBatches(decode)()\x1b[39m (pid=27852, ip=192.0.2.2)
ray.exceptions.UserCodeException: UDF failed to process a data block.
To change retry attempts, configure `ray.data.DataContext.get_current()`."""

ACTOR = """ray.data.exceptions.SystemException

The above exception was the direct cause of the following exception:

\x1b[36mray::run()\x1b[39m (pid=27763, ip=192.0.2.2)
  File "/ray/data/exceptions.py", line 115, in handle_trace
    raise e.with_traceback(None) from SystemException()
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task, \
\x1b[36mray::MapWorker(MapBatches(Bad)).__init__()\x1b[39m (pid=27922, ip=192.0.2.2, repr=MapWorker(MapBatches(Bad)))
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/p.py", line 7, in __init__
    raise ValueError("no such model")
ValueError: no such model:
- first
Fix it."""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (PIPELINE, "shard cut off:\n- line two `a`\n\nlast line"),
        (ACTOR, "no such model:\n- first\nFix it."),
        ("no traceback at all", "no traceback at all"),
    ],
)
def test_of_a_printed_error(text: str, cause: str) -> None:
    assert cause_in(text) == cause
