"""Run a study: many trainings that differ in what a sweep file says, and an answer to its question.

python -m mowe_ray.sweep SWEEP.yaml [key=value ...] [--dry-run]

A key is one of the sweep file (search.kind=random) or of the configuration, for all trials (training.epochs=2). Joins
the Ray cluster it was submitted to, else starts a local one. Run the same command again to go on after any
interruption. The last line on stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from mowe_ray.config import ConfigError, RunConfig
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.dry_run import dry_run
from mowe_ray.sweeping.load import load_sweep, render_sweep_help
from mowe_ray.sweeping.progress import StudyProgress
from mowe_ray.sweeping.report.files import write_results
from mowe_ray.sweeping.report.tables import table
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.search_space import Space
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import Cost, load_all
from mowe_ray.training.fault_tolerance.supervisor import run_child, supervise, supervised

# Deaths of the driver without a validation in between after which the supervisor gives up.
_MAX_FAILURES = 3


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 when all trials ended well, 1 when the study has no answer, 2 when the request was wrong, 3 when it has one
        but trials failed, 130 when it was interrupted.
    """
    arguments = _parser().parse_intermixed_args(argv)
    out = out or sys.stdout
    try:
        sweep = load_sweep(arguments.sweep, arguments.overrides)
        if not arguments.dry_run:
            Space(sweep).base.require_data()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        result, code = (dry_run(sweep, _cost, sys.stderr), 0) if arguments.dry_run else _run(sweep)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        result, code = {"sweep": sweep.name, "error": str(error)}, 1
    print(json.dumps(result), file=out, flush=True)
    return code


def supervised_main() -> int:
    """Run the command in a child process, which is started again when it dies without an answer."""
    if supervised():
        # Tune saves and ends on SIGINT alone.
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        return run_child(lambda out: main(out=out))
    arguments = _parser().parse_intermixed_args()
    try:
        sweep = load_sweep(arguments.sweep, arguments.overrides)
    except ConfigError:
        return main()  # it says what is wrong
    if arguments.dry_run:
        return main()
    folder = RunFolder(sweep.storage, sweep.name)
    return supervise(
        [sys.executable, "-m", "mowe_ray.sweep", *sys.argv[1:]],
        max_failures=_MAX_FAILURES,
        progress=lambda: sum(trial.step for trial in load_all(folder)),
        say=_say,
    )


def _run(sweep: SweepConfig) -> tuple[dict[str, Any], int]:
    from mowe_ray.distributed.ray_tune.tuner import run_study  # imports torch and ray

    began, progress = time.monotonic(), StudyProgress(_say)
    study = Study(sweep, _cost)
    written = 0

    def show(study: Study) -> None:
        nonlocal written
        progress.show(study)
        ended = sum(trial.over for trial in study.trials.values())
        if ended > written:  # the report is there, and grows, before the study ends
            written = ended
            write_results(study)

    try:
        interrupted = run_study(study, _say, show)
    finally:
        progress.close()
    result = write_results(study, elapsed_s=time.monotonic() - began)
    trials = list(study.trials.values())
    _say(f"{table(sweep, trials)}\n\n{result['answer']}\n\nreport: {result['report']}")
    if interrupted:
        return result, 130
    if result["best"] is None:
        return result, 1
    return result, 3 if result["trials"].get("failed") else 0


def _cost(config: RunConfig) -> Cost | None:
    """Return what a model costs; None where that cannot be told without its checkpoints, or at all."""
    from mowe_ray.training.estimate import estimate  # imports torch

    try:
        costs = estimate(config.model)
    except ValueError:  # its trial will fail, and say why; the others need not
        return None
    total = costs.total
    if costs.unknown or total.weights is None or total.gflops is None:
        return None
    share = costs.expected_share
    return Cost(total.weights.total, total.weights.expected(share), total.gflops.expected(share))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mowe_ray.sweep",
        description=__doc__,
        epilog=render_sweep_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="the study")
    parser.add_argument("--dry-run", action="store_true", help="print trials, resources and costs; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    return parser


if __name__ == "__main__":
    sys.exit(supervised_main())
