"""Train a MoWE AudioLLM.

python -m mowe_ray.train [--config PRESET_OR_FILE] [section.key=value ...] [--dry-run] [--find-batch]
    [--print-config]

Joins the Ray cluster it was submitted to (`ray job submit -- python -m mowe_ray.train ...`), else
starts a local one. Run the same command again to resume; when its driver dies, it does so itself. SIGTERM and
Ctrl-C save and end the run. The last line on stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from mowe_ray.config import ConfigError, RunConfig, load_config, render_help
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.layout import committed_steps
from mowe_ray.training.fault_tolerance.supervisor import run_child, supervise, supervised


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 on success, 1 when the run failed, 2 when the request was wrong, 128 + N when signal N stopped it.
    """
    arguments = _parser().parse_args(argv)
    out = out or sys.stdout
    try:
        config = load_config(arguments.config, arguments.overrides)
        if not (arguments.dry_run or arguments.find_batch or arguments.print_config):
            config.require_data()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.print_config:
        print(config.to_yaml(), end="", file=out)
        return 0
    for warning in config.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    try:
        result = _run(config, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        print(json.dumps({"run": config.name, "error": str(error)}), file=out, flush=True)
        return 1
    print(json.dumps(result), file=out, flush=True)
    return 128 + result["signal"] if "signal" in result else 0


def supervised_main() -> int:
    """Run the command in a child process, which is started again when it dies without an answer."""
    if supervised():
        return run_child(lambda out: main(out=out))
    arguments = _parser().parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError:
        return main()  # it says what is wrong
    if arguments.dry_run or arguments.find_batch or arguments.print_config:
        return main()
    folder = RunFolder(config.storage, config.name)
    return supervise(
        [sys.executable, "-m", "mowe_ray.train", *sys.argv[1:]],
        max_failures=config.compute.max_failures,
        progress=lambda: max(committed_steps(folder), default=-1),
        say=_say,
    )


def _run(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.dry_run:
        return _dry_run(config)
    if arguments.find_batch:
        return _find_batch(config, arguments.memory_bytes)
    return _train(config)


def _dry_run(config: RunConfig) -> dict[str, Any]:
    from mowe_ray.training.dry_run import dry_run  # imports torch, which --help must not wait for

    return dry_run(config, out=sys.stderr)


def _find_batch(config: RunConfig, limit_bytes: int | None) -> dict[str, Any]:
    from mowe_ray.distributed.batch_size.find_batch import find_batch  # imports torch and ray

    return find_batch(config, _say, limit_bytes)


def _train(config: RunConfig) -> dict[str, Any]:
    from mowe_ray.distributed.ray_train.driver import train  # imports torch and ray

    return train(config, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mowe_ray.train",
        description=__doc__,
        epilog=render_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="quickstart", metavar="PRESET_OR_FILE", help="default: quickstart")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, costs and data found; start nothing")
    parser.add_argument(
        "--find-batch",
        action="store_true",
        help="train on synthetic clips to see how many fit into memory; needs no data",
    )
    parser.add_argument("--memory-bytes", type=int, metavar="N", help="with --find-batch: use no more than N bytes")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="wins over file and preset")
    return parser


if __name__ == "__main__":
    sys.exit(supervised_main())
