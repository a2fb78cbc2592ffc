"""Run a study: the trainings that a sweep file defines, and an answer to its question.

python -m mowe_ray.sweep SWEEP [key=value ...] [--dry-run]

SWEEP is a YAML file, or the name of a study that is shipped, such as pool_size. A key is one of the sweep file
(search.kind=random) or of the configuration, for all trials (training.epochs=2). Joins the Ray cluster it was submitted
to, else starts a local one. Run the same command again to go on after any interruption. The last line on stdout is the
result as JSON.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from mowe_ray.command_line import (
    FAILURE,
    INTERRUPTED,
    SUCCESS,
    Supervision,
    log,
    make_parser,
    reject,
    run_and_print,
    run_supervised,
)
from mowe_ray.config import RunConfig
from mowe_ray.output.lease import held
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.compute_cost import ComputeCost
from mowe_ray.sweeping.dry_run import dry_run
from mowe_ray.sweeping.load import load_sweep, render_sweep_help
from mowe_ray.sweeping.one_shot import is_unscored
from mowe_ray.sweeping.progress import StudyProgress
from mowe_ray.sweeping.report.results import ResultsWriter, table
from mowe_ray.sweeping.schema import SweepConfig
from mowe_ray.sweeping.search_space import SearchSpace
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import ModelCost, load_all
from mowe_ray.training.clip_length import check_families
from mowe_ray.training.fault_tolerance.supervisor import stop_signals_handled, supervised

# Deaths of the driver without a validation in between after which the supervisor gives up.
_MAX_FAILURES = 3
# Exit code of a study that has an answer although trials failed.
_SOME_FAILED = 3


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
    try:
        sweep = load_sweep(arguments.sweep, arguments.overrides)
        base = SearchSpace(sweep).base
        if not arguments.dry_run:
            base.require_data()
            base.tracking.require()
        check_families(base.model)
    except ValueError as error:
        return reject(error)
    return run_and_print(
        lambda: (dry_run(sweep, _cost, sys.stderr), SUCCESS) if arguments.dry_run else _run(sweep),
        {"sweep": sweep.name},
        out,
    )


def supervised_main() -> int:
    """Run the command in a child process, which is restarted when it exits without a result."""
    if not supervised():
        return run_supervised("sweep", main, _supervision)
    came: list[int] = []

    def interrupt(number: int) -> None:
        came.append(number)
        if len(came) == 1:  # a second SIGINT would end Tune at once
            os.kill(os.getpid(), signal.SIGINT)

    # Tune saves and ends on SIGINT alone.
    with stop_signals_handled(interrupt, (signal.SIGTERM, signal.SIGHUP)):
        return run_supervised("sweep", main, _supervision)


def _supervision() -> Supervision | None:
    arguments = _parser().parse_intermixed_args()
    sweep = load_sweep(arguments.sweep, arguments.overrides)
    if arguments.dry_run:
        return None
    folder = RunFolder(sweep.storage, sweep.name)
    return Supervision(_MAX_FAILURES, lambda: sum(trial.step for trial in load_all(folder)))


def _run(sweep: SweepConfig) -> tuple[dict[str, Any], int]:
    with held(RunFolder(sweep.storage, sweep.name), log):
        return _run_study(sweep)


def _run_study(sweep: SweepConfig) -> tuple[dict[str, Any], int]:
    began, progress = time.monotonic(), StudyProgress(log)
    study, results, interrupted = _run_trials(sweep, progress)
    if not interrupted and is_unscored(sweep, study.folder, study.trials.values()):
        interrupted = _score_pools(study)
        if not interrupted:  # the same study goes on, now with pools to train alone
            study, results, interrupted = _run_trials(sweep, progress)
    try:
        study.save(insist=True)
        result = results.write(elapsed_s=time.monotonic() - began)
    except OSError as error:
        raise ValueError(f"storage: {study.folder.url} cannot be written: {error}; repeat the command") from error
    trials = list(study.trials.values())
    log(f"{table(sweep, trials)}\n{result['answer']}\n\nreport: {result['report']}")
    if interrupted:
        return result, INTERRUPTED
    if result["best"] is None:
        return result, FAILURE
    return result, _SOME_FAILED if result["trials"].get("failed") else SUCCESS


def _run_trials(sweep: SweepConfig, progress: StudyProgress) -> tuple[Study, ResultsWriter, bool]:
    """Run the trials that are known or can be chosen by now; returns also whether that was interrupted."""
    from mowe_ray.distributed.ray_tune.tuner import run_study  # imports torch and ray

    study = Study(sweep, ComputeCost(_cost).cost, log)  # replicas of a point share their model's
    results = ResultsWriter(study)

    def show(study: Study) -> None:
        progress.show(study)
        results.update()  # the report is there, and grows, before the study ends

    try:
        return study, results, run_study(study, log, show)
    finally:
        progress.close()


def _score_pools(study: Study) -> bool:
    """Score all pools with the weights of the supernets; returns whether that was interrupted."""
    from mowe_ray.distributed.ray_tune.pool_scores import score_pools  # imports torch and ray

    try:
        score_pools(study, log)
    except KeyboardInterrupt:
        return True
    return False


def _cost(config: RunConfig) -> ModelCost | None:
    """Return what a model costs; None if its checkpoints are needed for that, or it cannot be built."""
    from mowe_ray.training.estimate import estimate  # imports torch

    try:
        costs = estimate(config.model)
    except ValueError:  # its own trial fails with this error; others may run
        return None
    total = costs.total
    if costs.unknown or total.weights is None or total.gflops is None:
        return None
    share = costs.expected_share
    return ModelCost(total.weights.total, total.weights.expected(share), total.gflops.expected(share))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("sweep", __doc__, render_sweep_help())
    parser.add_argument("sweep", metavar="SWEEP", help="YAML file, or name of a shipped study")
    parser.add_argument("--dry-run", action="store_true", help="print trials, resources and costs; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    return parser


if __name__ == "__main__":
    sys.exit(supervised_main())
