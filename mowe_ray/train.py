"""Train a MoWE AudioLLM.

python -m mowe_ray.train [--config PRESET_OR_FILE] [section.key=value ...] [--dry-run] [--find-batch]
    [--print-config]

Joins the Ray cluster it was submitted to (`ray job submit -- python -m mowe_ray.train ...`), else
starts a local one. Run the same command again to resume; when its driver dies, it does so itself. SIGTERM and
Ctrl-C save and end the run. The last line on stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from mowe_ray.command_line import (
    FAILURE,
    SUCCESS,
    Supervision,
    log,
    make_run_parser,
    parse_run,
    reject,
    run_and_print,
    run_supervised,
)
from mowe_ray.config import RunConfig, load_config
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import RunDisplay, format_table, labelled
from mowe_ray.training.checkpoint.layout import committed_steps
from mowe_ray.training.clip_length import check_families


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 on success, 1 when the run failed or lost or repeated a sample, 2 when the request was wrong, 128 + N when
        signal N stopped it.
    """
    arguments = parse_run(_parser(), argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if not (arguments.dry_run or arguments.find_batch or arguments.print_config):
            config.require_data()
            config.tracking.require()
        check_families(config.model)
    except ValueError as error:
        return reject(error)
    if arguments.print_config:
        print(config.to_yaml(), end="", file=out or sys.stdout)
        return SUCCESS
    for warning in config.warnings():
        log(f"warning: {warning}")
    return run_and_print(lambda: _run(config, arguments), {"run": config.name}, out)


def supervised_main() -> int:
    """Run the command in a child process, which is restarted when it exits without a result."""
    return run_supervised("train", main, _supervision)


def _supervision() -> Supervision | None:
    arguments = parse_run(_parser())
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run or arguments.find_batch or arguments.print_config:
        return None
    folder = RunFolder(config.storage, config.name)
    return Supervision(config.compute.max_failures, lambda: max(committed_steps(folder), default=-1))


def _run(config: RunConfig, arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    if arguments.dry_run:
        return _dry_run(config), SUCCESS
    if arguments.find_batch:
        return _find_batch(config, arguments.memory_bytes), SUCCESS
    with RunDisplay() as show:
        show(labelled("run", f"{RunFolder(config.storage, config.name).url}, starting Ray"))
        from mowe_ray.distributed.ray_train.driver import is_exact, train  # takes seconds: imports ray

        result = train(config, show)
    if "stopped_at_step" in result:
        log(f"stopped at step {result['stopped_at_step']}; to go on: {_command()}")
    else:
        log(_closing_table(result))
    if "signal" in result:
        return result, 128 + result["signal"]
    return result, SUCCESS if is_exact(result) else FAILURE


def _command() -> str:
    return shlex.join(["python", "-m", "mowe_ray.train", *sys.argv[1:]])


def _closing_table(result: dict[str, Any]) -> str:
    """Format the scores of a finished run, and what to type next."""
    rows = [
        [task, *(f"{scores[key]:.3f}" for key in ("score", "majority"))] for task, scores in result["tasks"].items()
    ]
    scores = format_table(rows, ["task", "score", "majority"], right={1, 2}) if rows else ""
    run = shlex.quote(result["run"])
    commands = [f"evaluate {run}", f'ask {run} CLIP.wav "Write down what is said."', f"serve {run}"]
    return f"{scores}next:\n" + "\n".join(f"  python -m mowe_ray.{command}" for command in commands)


def _dry_run(config: RunConfig) -> dict[str, Any]:
    from mowe_ray.training.dry_run import dry_run  # imports torch, which --help must not wait for

    return dry_run(config, out=sys.stderr)


def _find_batch(config: RunConfig, limit_bytes: int | None) -> dict[str, Any]:
    from mowe_ray.distributed.batch_size.find_batch import find_batch  # imports torch and ray

    return find_batch(config, log, limit_bytes)


def _parser() -> argparse.ArgumentParser:
    parser = make_run_parser("train", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="print sizes, costs and data found; start nothing")
    parser.add_argument(
        "--find-batch",
        action="store_true",
        help="train on synthetic clips to see how many fit into memory; needs no data",
    )
    parser.add_argument("--memory-bytes", type=int, metavar="N", help="with --find-batch: use no more than N bytes")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    return parser


if __name__ == "__main__":
    sys.exit(supervised_main())
