"""Turn a corpus, as it is published, into shards to train from.

    python -m mowe_ray.prepare SOURCE --out DIR [options]

Progress goes to stderr; the last line on stdout is one JSON object. `DIR/data_report.json` counts
and lists what was left out. Nothing trains on `DIR` before all is written; after an interruption the
same command goes on.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from mowe_ray.command_line import FAILURE, SUCCESS, USAGE_ERROR, log, make_parser, print_result
from mowe_ray.config.plugins import import_plugins
from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.manifest_and_folders import check_labels
from mowe_ray.data.corpora.prepare import Packing, pack
from mowe_ray.data.corpora.registry import KINDS, check_source, count_samples, detect_kind, read_source
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.shards.fields import FIELDS, Reading
from mowe_ray.data.synthetic_corpus import DEFAULT_CLIPS, builtin_samples
from mowe_ray.output.terminal import outlive_terminal

_EXAMPLES = """\
  builtin      (SOURCE is the word builtin) synthetic speech and sounds, all five tasks

examples:
  python -m mowe_ray.prepare builtin --out shards/builtin --clips 2000
  python -m mowe_ray.prepare LibriSpeech --split train-clean-100 --out shards/clean-100
  python -m mowe_ray.prepare cv-corpus-15.0-2023-09-08/en --split test --out shards/common-voice
  python -m mowe_ray.prepare calls.jsonl --task asr --validation-fraction 0.05 --out shards/calls
  python -m mowe_ray.prepare calls.csv --columns audio=file answer=words --task asr --out shards/calls
  python -m mowe_ray.prepare emotions/ --task er --format parquet --out shards/emotions
  python -m mowe_ray.prepare words/ --task asr --label-from stem --out shards/words

docs/corpora.md tells where each corpus is to be had, and what a row of it becomes.
"""

_NOT_IN_THE_SHARDS = ("out", "overwrite", "threads")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 (no usable sample) or 2 (wrong arguments)."""
    try:
        import_plugins(_plugins().parse_known_args(arguments)[0].plugin)  # before their names are choices
    except ValueError as error:
        log(f"--plugin: {error}")
        return USAGE_ERROR
    parser = _parser()
    options = parser.parse_args(arguments)
    options.source, options.out = map(os.path.expanduser, (options.source, options.out))
    try:
        _check(options)
        read, total = _builtin(options) if options.kind == "builtin" else _published(options)
        result = pack(
            read,
            options.out,
            _packing(options),
            source=_source_name(options),
            total=total,
            overwrite=options.overwrite,
            request={name: value for name, value in vars(options).items() if name not in _NOT_IN_THE_SHARDS},
            log=log,
        )
    except ValueError as error:
        parser.exit(USAGE_ERROR, f"{parser.prog}: error: {error}\n")
    if not result["samples"]:
        log(f"{options.source} has no usable sample")
    return print_result(result, SUCCESS if result["samples"] else FAILURE)


def _plugins() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plugin", action="append", default=[])
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("prepare", "Turn a corpus into shards to train from.", _kinds() + _EXAMPLES)
    add = parser.add_argument
    add("--plugin", action="append", default=[], metavar="FILE", help="Python file of yours that reads other sources")
    add("source", metavar="SOURCE", help="file or folder, or the word builtin")
    add("--out", required=True, metavar="DIR", help="folder or fsspec URL for the shards")
    add("--overwrite", action="store_true", help="replace shards of an earlier run in DIR")
    add("--format", choices=["webdataset", "parquet"], default="webdataset", help="default: the first")
    add("--shard-size-mb", type=float, default=256, metavar="MB", help="about; default: 256")
    add("--kind", choices=["auto", *KINDS, "builtin"], default="auto", help="default: look at it")
    add("--split", metavar="NAME", help="part of it, such as train or dev-clean; default: all, if it has no test set")
    add("--task", metavar="NAME", help="where the source does not say: asr, er, ac, aqa, sqa, or yours")
    add("--instruction", metavar="TEXT", help="asked about rows without an instruction")
    names = "names of fields in the rows, where they are unusual: audio=file answer=words"
    add("--columns", nargs="+", default=[], metavar="FIELD=NAME", help=names)
    add("--label-from", metavar="WHAT", help="kinds folders and meld: what is the answer")
    add("--clips", type=int, metavar="N", help="the first N only; builtin: how many to make")
    add("--min-duration", type=float, default=0, metavar="S", help="leave out shorter clips")
    add("--max-duration", type=float, default=3600, metavar="S", help="and longer ones; an hour")
    held_out = "hold out this part: makes DIR/train and DIR/validation, no recording in both"
    add("--validation-fraction", type=float, default=0, metavar="F", help=held_out)
    named = "what rows may name outside of their table's folder: folder, URL or host; may be repeated"
    add("--allow-path", action="append", default=[], metavar="PLACE", help=named)
    add("--seed", type=int, default=0, metavar="N", help="of builtin and of what is held out")
    add("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="to check audio with")
    return parser


def _kinds() -> str:
    lines = ["kinds of source:"]
    for name, kind in KINDS.items():
        task = (kind.task,) if kind.task else ()
        choices = {"task": task, "--split": kind.splits, "--label-from": kind.labels}
        extra = "; ".join(f"{option} {'|'.join(values)}" for option, values in choices.items() if values)
        about = [*kind.about.split("\n"), extra] if extra else kind.about.split("\n")
        lines += [f"  {name if row == 0 else '':<13}{text}" for row, text in enumerate(about)]
    return "\n".join(lines) + "\n"


def _check(options: argparse.Namespace) -> None:
    """Find the kind, and raise ValueError for values and combinations that mean nothing."""
    if options.kind == "auto":
        is_builtin = options.source == "builtin"
        options.kind = "builtin" if is_builtin else detect_kind(Path(options.source))
        if options.kind == "folders" and options.label_from is None:
            check_labels(Path(options.source))
    builtin = options.kind == "builtin"
    asked = any(value is not None for value in (options.task, options.instruction, options.label_from))
    columns = [name.partition("=")[::2] for name in options.columns]
    wrong = {
        f"--columns takes FIELD=NAME, of the fields {', '.join(FIELDS)}": not all(
            field in FIELDS and name for field, name in columns
        ),
        "--validation-fraction is a number from 0 to 1": not 0 <= options.validation_fraction < 1,
        "--clips must be at least 1": options.clips is not None and options.clips < 1,
        "--seed must not be negative": options.seed < 0,
        "--threads must be at least 1": options.threads < 1,
        "--shard-size-mb must be above 0": options.shard_size_mb <= 0,
        "--max-duration must be above --min-duration": options.max_duration <= options.min_duration,
        "--task, --instruction and --label-from are not for builtin, which has its own": builtin and asked,
        "--split of builtin is train or validation": builtin and options.split not in (None, *DEFAULT_CLIPS),
        "--out lies inside SOURCE, where the next run would read it": not builtin
        and Path(options.out).resolve().is_relative_to(Path(options.source).resolve()),
    }
    for message, applies in wrong.items():
        if applies:
            raise ValueError(message)
    if not builtin:
        check_source(Path(options.source), options.kind, options.split, options.label_from)


def _builtin(options: argparse.Namespace) -> tuple[Callable[[], Iterable[Sample]], int]:
    split = options.split or "train"
    clips = options.clips or DEFAULT_CLIPS[split]
    return partial(builtin_samples, split, clips, options.seed), clips


def _published(
    options: argparse.Namespace,
) -> tuple[Callable[[], Iterable[Sample | BadSample]], int | None]:
    """How to start reading the source, and how many samples it has if that is known."""
    path, kind = Path(options.source), KINDS[options.kind]
    task, allow = options.task or kind.task, tuple(options.allow_path)
    reading = Reading(tuple(name.partition("=")[::2] for name in options.columns))
    defaults = Defaults(_source_name(options), task, options.instruction, allow, reading)

    def read() -> Iterable[Sample | BadSample]:
        return islice(read_source(path, options.kind, defaults, options.split, options.label_from), options.clips)

    total = count_samples(path, options.kind, options.split)
    if total is not None and options.clips is not None:
        total = min(total, options.clips)
    return read, total


def _source_name(options: argparse.Namespace) -> str:
    return "builtin" if options.kind == "builtin" else Path(options.source).absolute().stem


def _packing(options: argparse.Namespace) -> Packing:
    return Packing(
        format=options.format,
        shard_bytes=int(options.shard_size_mb * 2**20),
        validation_fraction=options.validation_fraction,
        seed=options.seed,
        min_s=options.min_duration,
        max_s=options.max_duration,
        threads=options.threads,
    )


if __name__ == "__main__":
    outlive_terminal()
    sys.exit(main())
