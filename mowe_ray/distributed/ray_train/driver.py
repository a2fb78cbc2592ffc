"""The driver of a run: index the data, start the training processes, return the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from mowe_ray.config import RunConfig
from mowe_ray.data.data_report import killers_in
from mowe_ray.data.feature_cache import FeatureCache
from mowe_ray.distributed import cluster, resources
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.ray_train.coordinator import RunCoordinator, WorkerSetup, print_lines, start_coordinator
from mowe_ray.distributed.ray_train.published import PublishedSources, SourcesOf, publish
from mowe_ray.distributed.ray_train.worker_group import fit, in_thread, stop_on_signals
from mowe_ray.output.lease import held
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import counted, labelled
from mowe_ray.training.checkpoint.layout import committed_steps
from mowe_ray.training.clip_length import check_clip_length
from mowe_ray.training.run_report import page_while_training
from mowe_ray.training.sample_audit import SAMPLES_FILE, audit_samples

_REPORT = "data_report.json"
# What may change between two runs of the same command without making it another experiment.
_FREE_TO_CHANGE = {
    "training": {"max_steps", "epochs", "gradient_accumulation"}
    | {"eval_every", "async_validation", "save_every", "log_every", "keep_checkpoints", "max_skipped_steps"}
    | {"step_timeout_s"},
    "compute": {"num_workers", "accelerator_type", "max_failures", "resize_interval_s", "cpus_per_worker"},
    "data": {"batch_seconds", "max_batch_size", "shuffle_buffer", "decode_cpus", "max_bad_fraction", "validation"}
    | {"group_by_length", "feature_cache", "storage_timeout_s"},
}


def train(
    config: RunConfig,
    log: Callable[[str], None],
    coordinator: ActorHandle[RunCoordinator] | None = None,
    *,
    patience_s: float = 0.0,
    sources_of: SourcesOf = publish,
) -> dict[str, Any]:
    """Run the training to its end, or continue it; returns the result, which `result.json` keeps.

    SIGTERM, SIGINT, SIGHUP and `RunCoordinator.stop` save and end the run; the result then has `stopped_at_step`, and
    the `signal` if there was one.

    Args:
        config: The run.
        log: Shows a line to the user.
        coordinator: Receives validations and may stop the run; by default a new one.
        patience_s: How long to wait for another driver of this run to end.
        sources_of: Indexes the data; the trials of a study have one that does it once for all of them.

    Raises:
        ValueError: The user must change something: the data, the resources, or the name of a folder of another run.
    """
    folder = RunFolder(config.storage, config.name)
    check_clip_length(config.model, config.data.max_duration_s)
    with held(folder, log, patience_s=patience_s):
        return _train(folder, config, log, coordinator, sources_of)


def _train(
    folder: RunFolder,
    config: RunConfig,
    log: Callable[[str], None],
    coordinator: ActorHandle[RunCoordinator] | None,
    sources_of: SourcesOf,
) -> dict[str, Any]:
    _claim(folder, config)
    dashboard = cluster.join(resources.cpus_of(config, config.compute.max_workers), log)
    _check_resources(folder, config, log)
    # Samples that ended a process earlier in this run, by its report: they are not tried again.
    killers = killers_in(folder.find_json(_REPORT, "bad_samples", warn=log) or {"bad_samples": []})
    sources = sources_of(config, killers)
    sources.report.add(killer for killer in killers if killer.file in sources.shards)
    for line in _header(config, folder, sources, dashboard):
        log(line)
    for line in sources.report.warnings:
        log(f"warning: {line}")
    for name, count in sources.report.text_only.items():
        log(f"{name}: {count} samples have no audio, and are trained or scored as text alone")
    if (result := folder.find_json("result.json", warn=log)) is not None and covers(result, config):
        log(f"{folder.url} is finished; choose another name to train again")
        return result
    with page_while_training(folder, log):
        return _fit(folder, config, log, coordinator or start_coordinator(), sources)


def _fit(
    folder: RunFolder,
    config: RunConfig,
    log: Callable[[str], None],
    coordinator: ActorHandle[RunCoordinator],
    sources: PublishedSources,
) -> dict[str, Any]:
    printer = print_lines(coordinator, log)
    cache = _filled_cache(config, sources, coordinator)
    setup = WorkerSetup(
        config=config,
        train_index=sources.train,
        validation_indexes=sources.validation,
        feature_cache=None if cache is None else ray.put(cache),
        report=sources.report,
        coordinator=coordinator,
    )
    with stop_on_signals(coordinator, log) as signals:
        # The main thread has to stay free: Python runs signal handlers there alone.
        result = in_thread(partial(fit, config, folder, setup, log))
    # Ends the printer after the last line, so that the result is not printed before it.
    ray.get(coordinator.log.remote(None))
    printer.join()
    if "error" in result:
        raise ValueError(result["error"])
    if "stopped_at_step" in result:
        return {**result, **({"signal": signals[0]} if signals else {})}
    if config.training.log_samples:
        weights = [source.weight for source in config.data.train]
        check = audit_samples(ray.get(sources.train), weights, folder.read_lines(SAMPLES_FILE), epochs=result["epochs"])
        log(str(check))
        result["samples"] = {"lost": check.lost, "repeated": check.repeated}
    if not folder.exists("config.json"):  # somebody has removed the folder meanwhile
        folder.write_json("config.json", config.model_dump(mode="json"))
    folder.write_json("result.json", result)
    return result


def _header(config: RunConfig, folder: RunFolder, sources: PublishedSources, dashboard: str | None) -> Iterator[str]:
    """Yield what a run has found and where it shows itself; the model is told by its rank 0."""
    compute, tracking = config.compute, config.tracking
    good = {name: facts["good"] for name, facts in sources.report.to_json()["sources"].items()}
    held_out = sum(good[name] for name in sources.validation)
    yield labelled("data", f"{sum(good.values()) - held_out:,} samples to train on, {held_out:,} to validate")
    least = f"{compute.min_workers} to " if compute.elastic else ""
    gpus = f", {counted(compute.gpus_per_worker, 'GPU')}" if compute.gpus_per_worker else ""
    yield labelled(
        "workers", f"{least}{counted(compute.max_workers, 'worker')} of {counted(compute.cpus_per_worker, 'CPU')}{gpus}"
    )
    if dashboard is not None:
        yield labelled("dashboard", dashboard)
    yield labelled("page", folder.path("report.html"))
    if tracking.tensorboard:
        yield labelled("tracking", f"tensorboard --logdir {folder.path('tensorboard')}")
    if tracking.wandb.mode != "off":
        yield labelled("tracking", f"wandb {tracking.wandb.mode}, project {tracking.wandb.project}")
    if tracking.mlflow is not None:
        yield labelled("tracking", f"mlflow {tracking.mlflow}")


def _filled_cache(
    config: RunConfig, sources: PublishedSources, coordinator: ActorHandle[RunCoordinator]
) -> FeatureCache | None:
    """Return the cache of decoded audio and frozen features, filled if need be; None without `data.feature_cache`."""
    if config.data.feature_cache is None:
        return None
    try:
        cache: FeatureCache = ray.get(_fill_cache.remote(config, sources, coordinator))
    except ray.exceptions.RayTaskError as error:
        raise ValueError(cause_of(error)) from error
    return cache


# In a process of its own, which trials of a study share one after the other: it imports the model, a driver need not.
@ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")
def _fill_cache(config: RunConfig, sources: PublishedSources, coordinator: ActorHandle[RunCoordinator]) -> FeatureCache:
    from mowe_ray.distributed.ray_data.feature_extraction import fill_cache

    indexes = ray.get([sources.train, *sources.validation.values()])
    return fill_cache(config, indexes, lambda line: ray.get(coordinator.log.remote(line)))


def _check_resources(folder: RunFolder, config: RunConfig, log: Callable[[str], None]) -> None:
    """Raise for a run that the cluster can never hold; one that has begun waits for the resources it has lost."""
    need = resources.total_resources(config.compute, config.data.decode_cpus, config.compute.min_workers)
    try:
        waits = resources.check_resources(need)
    except ValueError as error:
        if not committed_steps(folder):
            raise
        waits = f"warning: {error}; waiting for the rest of the cluster"
    if waits:
        log(waits)


def is_exact(result: dict[str, Any]) -> bool:
    """Whether no sample was lost or repeated in the run that gave `result`, as far as it was looked at."""
    return not any(result.get("samples", {}).values())


def covers(result: dict[str, Any], config: RunConfig) -> bool:
    """Whether the run that gave `result` was at least as long as `config` asks for."""
    length = config.training
    if length.max_steps is not None:
        return bool(result["steps"] >= length.max_steps)
    return bool(result["epochs"] >= (length.epochs or 0))


@dataclass(frozen=True)
class Claim:
    """Whether a run may use a folder.

    Attributes:
        resumes: The folder holds this run already.
        refusal: Why it may not; completes a sentence about the folder. None if it may.
    """

    resumes: bool
    refusal: str | None = None


def decide_claim(existing: dict[str, Any] | None, config: RunConfig) -> Claim:
    """Decide whether a run may use a folder.

    Args:
        existing: Content of the folder's `config.json`; None if it has none.
        config: The run.
    """
    if existing is None:
        return Claim(resumes=False)
    if not config.resume:
        return Claim(resumes=False, refusal="exists and resume=false: choose another name")
    difference = first_difference(_with_defaults(existing), config.model_dump(mode="json"))
    if difference is None:
        return Claim(resumes=True)
    return Claim(
        resumes=False,
        refusal=f"holds a run with another {difference}: choose another name, or go back to its value",
    )


def _claim(folder: RunFolder, config: RunConfig) -> None:
    """Write the configuration of the run to its folder, unless the folder is another's."""
    existing = folder.read_json("config.json") if folder.exists("config.json") else None
    claim = decide_claim(existing, config)
    if claim.refusal is not None:
        raise ValueError(f"{folder.url} {claim.refusal}")
    folder.write_json("config.json", config.model_dump(mode="json"))


def _with_defaults(old: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys that were added after the run, at their defaults."""
    try:
        # Without plugins: what is imported is named by the user, not by a folder.
        return RunConfig.model_validate({**old, "plugins": []}).model_dump(mode="json")
    except ValueError:  # written by a version with other keys; the first one that differs is reported
        return old


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Return the first dotted key that makes two configurations different experiments, None if there is none."""
    for section in ("seed", "model", "data", "training", "compute"):
        before, after = old.get(section), new[section]
        if not isinstance(after, dict):
            if before != after:
                return section
            continue
        for key, value in after.items():
            if key in _FREE_TO_CHANGE.get(section, set()):
                continue
            if _without_paths(key, (before or {}).get(key)) != _without_paths(key, value):
                return f"{section}.{key}"
    return None


def _without_paths(key: str, value: Any) -> Any:
    """Return a value without the paths of training data, which may move: checkpoints know samples by their ids."""
    if key == "train" and isinstance(value, list):
        return [{**source, "path": None} if isinstance(source, dict) else source for source in value]
    return value
