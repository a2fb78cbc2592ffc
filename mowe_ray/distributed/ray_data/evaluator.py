"""The driver of an evaluation: checks models and data, runs batch inference, and returns the predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import ray

from mowe_ray.config import ConfigError, EvaluationConfig
from mowe_ray.config.schema import WorkersSection
from mowe_ray.data.epoch_plan import PLAN_VERSION
from mowe_ray.data.index import Index
from mowe_ray.data.profile import sample_rows
from mowe_ray.distributed import cluster, resources
from mowe_ray.distributed.ray_data.batch_inference import AnswerJob, answer_all, inspect_export
from mowe_ray.distributed.ray_data.parallel_map import parallel_map
from mowe_ray.evaluation.compare import AnsweredModel
from mowe_ray.evaluation.predictions import Answer, Predictions
from mowe_ray.evaluation.shapley import Subset, joining_orders, subsets_of
from mowe_ray.evaluation.targets import Target, evaluation_folder, export_version, folder_at
from mowe_ray.training.build import model_dtype
from mowe_ray.training.clip_length import check_exported_clip_length
from mowe_ray.training.datasets import (
    check_validation,
    data_report,
    scan_validation,
    validation_plan,
)
from mowe_ray.training.estimate import ExportCost


def answer_datasets(
    targets: Sequence[Target], config: EvaluationConfig, log: Callable[[str], None], *, shapley: bool = False
) -> tuple[list[AnsweredModel], dict[str, Index]]:
    """Answers all datasets with all models, returned with the indexes; stored answers are not computed again.

    Nothing is written before models and data are known to be usable.

    Args:
        targets: The models.
        config: The evaluation.
        log: Called with each line of progress.
        shapley: Answer also with the subsets of each pool that Shapley values need.

    Raises:
        ValueError: Something the user must change: a model, the data, the resources.
    """
    compute, data = config.compute, config.data
    cluster.join(resources.total_resources(compute, data.decode_cpus, compute.max_workers)["CPU"], log)
    if waits := resources.check_resources(resources.total_resources(compute, data.decode_cpus, compute.min_workers)):
        log(waits)
    for target in targets:
        if target.served_as is None:
            export = folder_at(target.export).read_json("config.json")
            check_exported_clip_length(export, config.generation.max_audio_s, "generation.max_audio_s")
    # Before any data are read: a missing weight should not cost an hour of answers.
    costs = [None if target.served_as is not None else inspect_export(target.export, config) for target in targets]
    indexes = scan_validation(data, parallel_map, seed=config.seed)
    check_validation(data, indexes)
    data_report(indexes.values()).check(data.max_bad_fraction)
    _require_tasks(indexes)
    models = [
        _answered(target, cost, indexes, config, log, shapley) for target, cost in zip(targets, costs, strict=True)
    ]
    return models, indexes


def _require_tasks(indexes: Mapping[str, Index]) -> None:
    for i, (name, index) in enumerate(indexes.items()):
        nameless = sum(task == "other" for task in index.table["task"].to_pylist())
        if nameless:
            raise ConfigError(
                [f"data.validation.{i}.task: nothing says the task of {nameless} of {len(index)} samples of {name}"]
            )


def _answered(
    target: Target,
    cost: ExportCost | None,
    indexes: Mapping[str, Index],
    config: EvaluationConfig,
    log: Callable[[str], None],
    shapley: bool,
) -> AnsweredModel:
    members = [] if cost is None else cost.members
    ablated, every = bool(config.ablation_samples), range(len(members))
    single = [frozenset(every) - {member} for member in every if ablated]
    running = subsets_of(joining_orders(len(every), config.seed))[:-1] if ablated and shapley and every else []
    jobs: dict[tuple[str, Subset], AnswerJob] = {
        (name, subset): _job(target, config, name, index, [members[i] for i in out], out)
        for subset in dict.fromkeys([frozenset(every), *single, *running])
        for out in [tuple(i for i in every if i not in subset)]
        for name, index in indexes.items()
    }
    for job in jobs.values():
        if job.predictions.replaced:
            log(f"{job.label}: answered anew, for {', '.join(job.predictions.replaced)} changed")
    answer_all(target, list(jobs.values()), config, log)
    predictions_by_name = {name: jobs[name, frozenset(every)].predictions for name in indexes}
    _check_bad(predictions_by_name, config.data.max_bad_fraction)
    answers = {name: predictions.answers() for name, predictions in predictions_by_name.items()}
    audio_s = sum(predictions.audio_s for predictions in predictions_by_name.values())
    # Of a server it would tell of its load, and of the way to it.
    factor = sum(p.seconds for p in predictions_by_name.values()) / audio_s if audio_s and cost is not None else None
    loads = [] if cost is None else _loads([answer for found in answers.values() for answer in found], cost)
    return AnsweredModel(
        name=target.name,
        folder=target.export,
        members=members,
        history=target.history,
        answers=answers,
        without={
            members[member]: {name: jobs[name, subset].predictions.answers() for name in indexes}
            for member, subset in zip(every, single, strict=False)
        },
        subsets={subset: {name: jobs[name, subset].predictions.answers() for name in indexes} for subset in running},
        stored=None if cost is None else cost.weights.total,
        active=None if cost is None else cost.weights.at(loads),
        gflops=None if cost is None else cost.gflops.at(loads),
        real_time_factor=factor,
        bad={name: predictions.bad for name, predictions in predictions_by_name.items() if predictions.bad},
    )


def _job(
    target: Target, config: EvaluationConfig, name: str, index: Index, without: Sequence[str], excluded: tuple[int, ...]
) -> AnswerJob:
    """Returns the job of a dataset or, for an ablation, of some of it without pool members, by names and numbers."""
    source = dict(zip(config.data.validation_names, config.data.validation, strict=True))[name]
    subset = np.arange(len(index)) if not without else sample_rows(len(index), config.ablation_samples)
    chosen = index if not without else Index(index.table.take(subset), index.source_names, [], index.fingerprints)
    longest = config.data.max_text_tokens
    settings = {
        "model": _version(target),
        "data": [source.path, index.fingerprints, config.data.min_duration_s, config.data.max_duration_s]
        + ([] if longest is None else [longest]),  # stored answers of before this key keep their settings
        "samples": len(chosen),
        "batches": [config.data.batch_seconds, config.data.max_batch_size, PLAN_VERSION],
        "generation": config.generation.model_dump(mode="json", exclude={"dtype"}),
        "seed": config.seed if config.generation.instruction == "task" else None,
        "numbers": _numbers(target, config),
        # Not a list for a single one, as stored answers have it.
        "without": without[0] if len(without) == 1 else list(without) or None,
    }
    file = f"predictions/without_{'+'.join(without)}/{name}" if without else f"predictions/{name}"
    label = f"{name} without {', '.join(without)}" if without else name
    plan = [step[0] for step in validation_plan(chosen, config.data)]
    predictions = Predictions(evaluation_folder(target, config.out), file, settings)
    return AnswerJob(label, chosen, plan, excluded, predictions, source.labels)


def _version(target: Target) -> dict[str, str]:
    if target.served_as is not None:
        return {"server": target.export, "name": target.served_as}
    return export_version(folder_at(target.export))


def _numbers(target: Target, config: EvaluationConfig) -> str | None:
    if target.served_as is not None:
        return None
    return str(model_dtype(config.generation, config.compute.gpus_per_worker > 0)).removeprefix("torch.")


def _check_bad(predictions_by_name: Mapping[str, Predictions], max_bad_fraction: float) -> None:
    for name, predictions in predictions_by_name.items():
        bad, good = sum(predictions.bad.values()), len(predictions.answers())
        if not good or bad > max_bad_fraction * (bad + good):
            causes = ", ".join(f"{count} {cause}" for cause, count in predictions.bad.items())
            raise ValueError(
                f"{name}: {bad} of {bad + good} samples cannot be used: {causes} "
                f"(data.max_bad_fraction is {max_bad_fraction:g})"
            )


def _loads(answers: Sequence[Answer], cost: ExportCost) -> list[float]:
    """Returns the share of the clips each pool member ran for."""
    if not cost.routed:
        return [1.0] * len(cost.members)
    ran = [
        np.max([choice.load for choice in (answer.independent, answer.dependent) if choice is not None], axis=0)
        for answer in answers
        if answer.independent is not None or answer.dependent is not None
    ]
    return [float(load) for load in np.mean(ran, axis=0)] if ran else [0.0] * len(cost.members)


def device(compute: WorkersSection) -> str:
    """Returns the name of the hardware that the models ran on."""
    if not compute.gpus_per_worker:
        return f"CPU, {compute.cpus_per_worker} core{'' if compute.cpus_per_worker == 1 else 's'} a worker"
    kinds = {name.partition(":")[2] for name in ray.cluster_resources() if name.startswith("accelerator_type:")}
    return compute.accelerator_type or ", ".join(sorted(kinds)) or "GPU"
