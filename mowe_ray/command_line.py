"""Parts shared by the five commands: parsers, exit codes, the result line, and the supervised child process.

Standard output carries the result alone, one JSON object on the last line; everything else goes to standard error.
Nothing here imports torch or Ray, so that `--help` answers at once: commands import what needs them where they call it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

from mowe_ray.config import load_config, render_help
from mowe_ray.output.terminal import outlive_terminal
from mowe_ray.training.fault_tolerance.supervisor import run_child, supervise, supervised

SUCCESS, FAILURE, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130


class Supervision(NamedTuple):
    """How a supervised command is restarted.

    Attributes:
        max_failures: Deaths without progress in between after which the supervisor gives up.
        progress: Returns a number that grows whenever the command has saved something.
    """

    max_failures: int
    progress: Callable[[], int]


def log(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


def make_parser(
    command: str, description: str | None, epilog: str, *, add_help: bool = True
) -> argparse.ArgumentParser:
    """Return the parser of `python -m mowe_ray.COMMAND`, which prints description and epilog as they are written."""
    return argparse.ArgumentParser(
        prog=f"python -m mowe_ray.{command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=add_help,
    )


def make_run_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command that takes the configuration of a run, for `parse_run`."""
    parser = make_parser(command, description, "", add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this text, with what the plugins given add")
    parser.add_argument("--config", default="quickstart", metavar="PRESET_OR_FILE", help="default: quickstart")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="wins over file and preset")
    return parser


def parse_run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments of a parser of `make_run_parser`; help is printed once their plugins are imported."""
    arguments = parser.parse_args(argv)
    if arguments.help:
        with contextlib.suppress(ValueError):  # help is for those whose configuration is not right yet
            load_config(arguments.config, arguments.overrides)
        parser.epilog = render_help()
        parser.print_help()
        parser.exit()
    return arguments


def print_result(result: dict[str, Any], code: int, out: TextIO | None = None) -> int:
    """Print the result line to `out`, by default standard output; returns `code`, a failure if nobody can read it."""
    out = out or sys.stdout
    try:
        print(json.dumps(result), file=out, flush=True)
    except OSError as error:  # the terminal is closed, or the disk behind it full
        log(f"error: the result cannot be written to standard output: {error}")
        # Or Python tries again while it exits, fails, and changes the exit code.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return code or FAILURE
    return code


def reject(error: ValueError) -> int:
    """Report a request that cannot be carried out; returns the exit code for it."""
    log(str(error))
    return USAGE_ERROR


def run_and_print(
    run: Callable[[], tuple[dict[str, Any], int]],
    subject: dict[str, Any],
    out: TextIO | None,
    usage_errors: tuple[type[ValueError], ...] = (),
) -> int:
    """Run a command, print its result line and return its exit code.

    Args:
        run: Returns the result and the exit code. A ValueError of it becomes the result.
        subject: The entries of a failed command's result that name what it ran on, beside `error`.
        out: Stream for the result line, by default standard output.
        usage_errors: Errors of `run` that are reported as a wrong request, without a result line.
    """
    try:
        result, code = run()
    except usage_errors as error:
        return reject(error)
    except ValueError as error:
        log(f"error: {error}")
        result, code = {**subject, "error": str(error)}, FAILURE
    return print_result(result, code, out)


def run_supervised(command: str, main: Callable[..., int], plan: Callable[[], Supervision | None]) -> int:
    """Run `main` in a child process that is restarted when it dies before it has printed a result.

    Args:
        command: Name of the command's module in `mowe_ray`.
        main: The command; takes the stream for its result line as `out`.
        plan: Reads the process's arguments; returns None where the command starts nothing that may die, and may raise
            ValueError. In both cases `main` runs in this process.

    Returns:
        The exit code.
    """
    outlive_terminal()
    if supervised():
        return run_child(lambda out: main(out=out))
    try:
        supervision = plan()
    except ValueError:
        supervision = None  # `main` reports it
    if supervision is None:
        return main()
    arguments = [sys.executable, "-m", f"mowe_ray.{command}", *sys.argv[1:]]
    return supervise(arguments, max_failures=supervision.max_failures, progress=supervision.progress, log=log)
