"""Score trained models: answers to every dataset, standard metrics, and routing statistics.

python -m mowe_ray.evaluate RUN_OR_EXPORT [MORE ...] [section.key=value ...]
python -m mowe_ray.evaluate RUN_OR_EXPORT http://localhost:8000/v1[#MODEL] ...     # beside a model that is served

Data and resources are those of the (first) run unless given. Several models are compared on the same samples. Joins
the Ray cluster it was submitted to, else starts a local one. Run the same command again to go on after any
interruption: stored answers are kept. The last line on stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TextIO

from mowe_ray.command_line import (
    INTERRUPTED,
    SUCCESS,
    log,
    make_parser,
    print_result,
    reject,
    run_and_print,
)
from mowe_ray.config import ConfigError, EvaluationConfig, load_evaluation, render_help
from mowe_ray.config.data_section import ValidationSource
from mowe_ray.evaluation.chat_endpoint import ChatEndpoint
from mowe_ray.evaluation.judge.judge import Judge
from mowe_ray.evaluation.metrics.captions import sentence_similarity
from mowe_ray.evaluation.metrics.registry import JUDGED_SCALES, DatasetMetrics, check_names, judged_metric
from mowe_ray.evaluation.targets import (
    Target,
    check_baseline,
    evaluation_folder,
    find_models,
    is_server,
    report_folder,
)
from mowe_ray.output.lease import held
from mowe_ray.output.terminal import outlive_terminal


class _Options(NamedTuple):
    all_samples: bool
    shapley: bool


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 on success, 1 when the evaluation failed, 2 when the request was wrong, 130 when it was interrupted.
    """
    arguments = _parser().parse_intermixed_args(argv)
    options = _Options(arguments.samples == "all", arguments.shapley)
    models = [text for text in arguments.arguments if "=" not in text]
    overrides = [text for text in arguments.arguments if "=" in text]
    try:
        if not models:
            raise ConfigError(["RUN_OR_EXPORT: name at least one run or export"])
        folders = find_models([path for path in models if not is_server(path)])
        config = load_evaluation(folders[0].config if folders else None, overrides)
        targets = find_models(models, lambda url: _first_model(url, config))
        _check_servers(targets, config)
        if not config.data.validation:
            raise ConfigError(["data.validation: nothing to evaluate on; add data.validation.0.path=FOLDER"])
        for i, source in enumerate(config.data.validation):
            check_names(source.metrics, f"data.validation.{i}.metrics")
        check_baseline(targets, config.baseline)
    except ValueError as error:
        return reject(error)
    subject = {"models": [target.home if target.served_as is None else target.export for target in targets]}
    try:
        return run_and_print(lambda: (_evaluate(targets, config, options), SUCCESS), subject, out, (ConfigError,))
    except KeyboardInterrupt:
        log("interrupted: run the same command again to go on")
        return print_result({**subject, "interrupted": True}, INTERRUPTED, out)


def _first_model(url: str, config: EvaluationConfig) -> str:
    return ChatEndpoint(url, "", **config.server.model_dump(), section="server").first_model()


def _check_servers(targets: Sequence[Target], config: EvaluationConfig) -> None:
    if targets[0].served_as is not None and config.out is None:
        raise ConfigError(["out: name a folder for the results of a server, out=FOLDER, or a run before the server"])
    if config.generation.num_beams > 1 and any(target.served_as for target in targets):
        raise ConfigError(["generation.num_beams: must be 1, servers search no beams"])


def _evaluate(targets: Sequence[Target], config: EvaluationConfig, options: _Options) -> dict[str, Any]:
    folders = [report_folder(targets, config.out), *(evaluation_folder(target, config.out) for target in targets)]
    with ExitStack() as leases:
        for folder in {folder.url: folder for folder in folders}.values():
            leases.enter_context(held(folder, log))
        return _answer_and_compare(targets, config, options)


def _answer_and_compare(targets: Sequence[Target], config: EvaluationConfig, options: _Options) -> dict[str, Any]:
    from mowe_ray.distributed.ray_data.clips import with_clips
    from mowe_ray.distributed.ray_data.evaluator import answer_datasets, device  # imports torch and ray
    from mowe_ray.evaluation.compare import MOST_SHOWN, compare, write_results
    from mowe_ray.evaluation.report.summary import table

    named = zip(config.data.validation_names, config.data.validation, strict=True)
    metrics = {name: _metrics(name, source, targets, config) for name, source in named}
    answered, indexes = answer_datasets(targets, config, log, shapley=options.shapley)
    log("scoring")
    evaluation = compare(
        answered,
        metrics=metrics,
        baseline=config.baseline,
        seed=config.seed,
        device=device(config.compute),
        shown=None if options.all_samples else MOST_SHOWN,
    )
    page = report_folder(targets, config.out)
    evaluation = with_clips(evaluation, indexes, config.data, page, every=options.all_samples)
    result = write_results(evaluation, targets, config.out)
    log(table(evaluation))
    log(f"report: {result['report']}")
    return result


def _metrics(
    name: str, source: ValidationSource, targets: Sequence[Target], config: EvaluationConfig
) -> DatasetMetrics:
    made = {}
    if config.judge.base_url is not None:
        endpoint = ChatEndpoint(**config.judge.model_dump())
        judge = Judge(endpoint, report_folder(targets, config.out), name, log)
        made = {name: judged_metric(name, judge) for name in JUDGED_SCALES}
    if config.sentence_model is not None:
        made["sentence_similarity"] = sentence_similarity(config.sentence_model)
    return DatasetMetrics(source.metrics, source.labels, made, source.language)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("evaluate", __doc__, render_help(EvaluationConfig))
    parser.add_argument(
        "--samples", choices=("telling", "all"), default="telling",
        help="all: every sample is on the page, with its clip in samples/ beside it; else the most telling ones",
    )  # fmt: skip
    parser.add_argument(
        "--shapley", action="store_true",
        help="Shapley values of the encoders: all subsets of a pool of up to 6, 64 of a larger one, answer again",
    )  # fmt: skip
    parser.add_argument("arguments", nargs="+", metavar="RUN_OR_EXPORT | section.key=value", help="models, then keys")
    return parser


if __name__ == "__main__":
    outlive_terminal()
    sys.stdout, stdout = sys.stderr, sys.stdout  # Ray's own threads print too, and the result is to be the last line
    sys.exit(main(out=stdout))
