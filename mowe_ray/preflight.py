"""Check a cluster before a run: resources, versions, storage, checkpoints, audio, disks, network.

python -m mowe_ray.preflight [--config PRESET_OR_FILE] [section.key=value ...] [--timeout SECONDS]

Takes the configuration of `mowe_ray.train` and looks whether the cluster it was submitted to (`ray job submit --
python -m mowe_ray.preflight ...`), else this machine, has what that run needs, on every node. Trains nothing, and
leaves nothing behind. The last line on stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn, TextIO

from mowe_ray.command_line import FAILURE, SUCCESS, log, make_run_parser, parse_run, print_result, reject
from mowe_ray.config import ConfigError, RunConfig, load_config
from mowe_ray.output.terminal import duration, outlive_terminal

_WAITING = "limited"  # name of the threads that go on after a timeout, of `node_checks.within`
_STATUS_LABELS = {"ok": "ok", "warning": "warning", "failed": "FAILED"}


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 when the run can start, perhaps with warnings; 1 when a check failed; 2 when the request was wrong.
    """
    arguments = parse_run(_parser(), argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        return reject(error)
    result = _preflight(config, arguments.timeout)
    return print_result(result, SUCCESS if result["preflight"] == "ok" else FAILURE, out)


def _preflight(config: RunConfig, timeout_s: float) -> dict[str, Any]:
    from mowe_ray.distributed.preflight.preflight import preflight  # imports torch and ray

    began = before = time.monotonic()
    checks = []
    for check in preflight(config, timeout_s):
        now = time.monotonic()
        checks.append(check)
        log(f"{_STATUS_LABELS[check.status]:<8} {check.name:<12} {check.detail} ({now - before:.1f} s)")
        if check.fix is not None:
            log(f"{'':21} -> {check.fix}")
        before = now
    failed = [check.name for check in checks if check.status == "failed"]
    log(f"{len(checks)} checks in {duration(time.monotonic() - began)}: {', '.join(failed) or 'none'} failed")
    return {"preflight": "failed" if failed else "ok", "checks": [asdict(check) for check in checks]}


def _parser() -> argparse.ArgumentParser:
    parser = make_run_parser("preflight", __doc__)
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long to wait for the answer of a node, and for the nodes of an autoscaler; default: 120",
    )
    return parser


def _end(code: int) -> NoReturn:
    """End the process; at once if a check that timed out still waits in Ray, whose threads crash Python's clean-up."""
    if any(thread.name == _WAITING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    outlive_terminal()
    _end(main())
