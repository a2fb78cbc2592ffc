"""The training process: build, restore, train, validate, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray.train
import torch

from mowe_ray import __version__
from mowe_ray.config import RunConfig
from mowe_ray.config.plugins import plugin_frame
from mowe_ray.data.data_report import DataReport
from mowe_ray.data.feature_cache import FeatureCache
from mowe_ray.data.index import Index
from mowe_ray.data.shards.storage import storage_timeout
from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine, build_engine
from mowe_ray.distributed.ray_train.async_validation import AsyncValidation
from mowe_ray.distributed.ray_train.coordinator import WorkerSetup
from mowe_ray.distributed.ray_train.ray_metrics import RayMetrics
from mowe_ray.distributed.ray_train.train_run import RayReporter, TrainRun
from mowe_ray.evaluation.model_card import CARD, model_card, while_training
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.export_check import try_export
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import amount, labelled
from mowe_ray.training.build import own_tokenizer, tokenizer_of, write_export
from mowe_ray.training.checkpoint.reader import Checkpoint, newest_checkpoint
from mowe_ray.training.checkpoint.writer import CheckpointWriter
from mowe_ray.training.fault_tolerance.out_of_memory import OutOfMemoryRecords
from mowe_ray.training.fault_tolerance.watchdog import ActivityTracker
from mowe_ray.training.flops import parameters_of, running_members
from mowe_ray.training.frozen_features import encoder_key
from mowe_ray.training.ledger import keep_ids, load_ids
from mowe_ray.training.monitor import Monitor
from mowe_ray.training.protocols import Ranks, RunError
from mowe_ray.training.sample_audit import SampleAuditLog
from mowe_ray.training.sampler import EpochSampler
from mowe_ray.training.tracker import Tracker
from mowe_ray.training.useful_work import TrainingWork
from mowe_ray.training.validation import ValidationResult, scores_of_tasks


def train_worker(setup: WorkerSetup) -> dict[str, Any]:
    """Train on this rank.

    Returns:
        The result of the run; with `stopped_at_step` if it was asked to stop before the end; or {"error": ...} if only
        the user can fix it.
    """
    try:
        return _train(setup)
    except RunError as error:  # raised by all ranks together: returning spares the pointless restarts
        return {"error": str(error)}
    except Exception as error:  # raised again, with its place
        frame = plugin_frame(error)  # travels to the driver as a note; tracebacks do not
        error.add_note(f"{frame.filename}:{frame.lineno}")
        raise


def _train(setup: WorkerSetup) -> dict[str, Any]:
    is_rank_zero = ray.train.get_context().get_world_rank() == 0
    if is_rank_zero:
        setup.coordinator.end_recovery_phase.remote("restart")
    run = _start(setup, lambda line: setup.coordinator.log.remote(line) if is_rank_zero else None)
    if is_rank_zero:
        setup.coordinator.end_recovery_phase.remote("load")
    if not run.train():
        run.monitor.close()
        return {"run": run.folder.url, "stopped_at_step": run.sampler.step}
    validation = run.validate()
    # The last one: schedulers and Ray's dashboard see the final scores.
    run.reporter.report()
    _export(run, validation)
    run.monitor.finish(validation)
    return {
        "run": run.folder.url,
        "export": run.folder.path("export"),
        "steps": run.sampler.step,
        "epochs": run.sampler.epochs_finished,
        "tasks": scores_of_tasks(validation),
        "sources": {name: result.scores for name, result in validation.items()},
    }


def _start(setup: WorkerSetup, log: Callable[[str], object]) -> TrainRun:
    """Build the parts of the run and restore its newest checkpoint. Collective."""
    config = setup.config
    folder, activity = RunFolder(config.storage, config.name), ActivityTracker()
    if config.compute.gpus_per_worker == 0:
        torch.set_num_threads(config.compute.cpus_per_worker)
    index = ray.get(setup.train_index)
    with storage_timeout(config.data.storage_timeout_s):  # one that is made for the run reads samples
        tokenizer = tokenizer_of(config.model, own_tokenizer(config.model, index, folder))
    processor, engine = build_engine(config, tokenizer, activity, log)
    if setup.feature_cache is not None and not engine.sharded:
        _check_cache(ray.get(setup.feature_cache), engine)
    ranks = Ranks(engine.rank, engine.world_size, engine.gather, engine.all_reduce, log)
    log(_model_line(engine.model))
    checkpoint = newest_checkpoint(folder, ranks)
    if checkpoint is not None:
        engine.restore(checkpoint)
        log(f"continuing after step {checkpoint.step}, on {_workers(engine.world_size)}")
    else:
        _check_export(config, processor, engine, ranks)
    if ranks.is_rank_zero:
        keep_ids(folder, index)
    sampler = _sampler(config, index, folder, checkpoint)
    sample_log = SampleAuditLog(ranks, folder, resume_step=sampler.step) if config.training.log_samples else None
    if sampler.changes is not None:
        log(f"warning: {sampler.changes}")
        if sample_log is not None:
            sample_log.data_changed(sampler.step, sampler.epoch, index, sampler.changes.new)
    return TrainRun(
        config=config,
        folder=folder,
        train_index=setup.train_index,
        validation_indexes=setup.validation_indexes,
        feature_cache=setup.feature_cache,
        processor=processor,
        engine=engine,
        ranks=ranks,
        sampler=sampler,
        writer=CheckpointWriter(folder, ranks, keep=config.training.keep_checkpoints),
        monitor=_monitor(setup.report, config, folder, ranks, sampler, _work(config, engine, index)),
        records=_records(setup.report, folder, index, ranks),
        sample_log=sample_log,
        async_validation=AsyncValidation(setup, config, folder, engine, processor, ranks, resume_step=sampler.step),
        reporter=RayReporter(),
        coordinator=setup.coordinator,
        activity=activity,
    )


def _model_line(model: MoweForConditionalGeneration) -> str:
    weights, trained = parameters_of(model)
    fewest, most = map(amount, weights.active(running_members(model.config)))
    active = fewest if fewest == most else f"{fewest} to {most}"
    return labelled("model", f"{amount(weights.total)} weights: {active} run for a clip, {amount(trained)} are trained")


def _sampler(config: RunConfig, index: Index, folder: RunFolder, checkpoint: Checkpoint | None) -> EpochSampler:
    try:
        return EpochSampler(
            index,
            config.data,
            seed=config.seed,
            micro_batches_per_step=config.micro_batches_per_step,
            epochs=config.training.epochs,
            max_steps=config.training.max_steps,
            warmup_steps=config.training.warmup_steps,
            state=None if checkpoint is None else checkpoint.state,
            load_ids=partial(load_ids, folder),
        )
    except ValueError as error:  # every rank finds the same
        raise RunError(str(error)) from error


def _records(report: DataReport, folder: RunFolder, index: Index, ranks: Ranks) -> OutOfMemoryRecords:
    records = OutOfMemoryRecords.load(folder, index)
    if warning := records.warning():
        ranks.log(f"warning: {warning}")
    report.set_out_of_memory(**records.report())
    return records


def _check_cache(cache: FeatureCache, engine: DeepSpeedEngine) -> None:
    """Make sure that the cached features are those of the encoders in the model. Collective.

    They can differ only if a checkpoint changes between the driver's look at it and ours, or on one node. Shards of
    ZeRO-3 have no hash; they come from the same checkpoints.
    """
    config, changed = engine.model.config, []
    if engine.rank == 0:
        encoders = engine.model.audio_tower.encoders()
        features = [spec.features for spec in (config.base_encoder, *(config.weak_encoders or []))]
        changed = [
            kept.label
            for kept in cache.encoders
            if kept.key != encoder_key(encoders[kept.encoder_index], features[kept.encoder_index], config.pad_audio)
        ]
    if changed := engine.gather(changed)[0]:
        raise RunError(
            f"data.feature_cache holds features of other weights than those loaded now for {', '.join(changed)}: "
            f"did a checkpoint change? Remove {cache.folder}/encoders and run the same command again"
        )


def _check_export(config: RunConfig, processor: MoweProcessor, engine: DeepSpeedEngine, ranks: Ranks) -> None:
    """Check before the first step that the run can end with a right export. Collective."""
    problem = None
    if ranks.is_rank_zero:
        try:
            untried = try_export(engine.model, processor, merge=config.model.merges_lora)
        except ValueError as error:
            problem = str(error)
        else:
            if untried is not None:
                ranks.log(f"warning: the export could not be tried before training: {untried}")
    if problem := ranks.gather(problem)[0]:
        raise RunError(problem)


def _workers(number: int) -> str:
    return f"{number} worker{'' if number == 1 else 's'}"


def _work(config: RunConfig, engine: DeepSpeedEngine, index: Index) -> TrainingWork | None:
    """Return what micro-batches cost, on rank 0, which logs it."""
    if engine.rank:
        return None
    with torch.device("meta"):
        model = MoweForConditionalGeneration(engine.model.config)
    longest = float(index.durations.max())
    return TrainingWork(model, max_s=longest, recomputed=config.model.gradient_checkpointing)


def _monitor(
    report: DataReport,
    config: RunConfig,
    folder: RunFolder,
    ranks: Ranks,
    sampler: EpochSampler,
    work: TrainingWork | None,
) -> Monitor:
    # On the node of rank 0, where the trackers are: the driver may have a key that it lacks.
    if lacks := ranks.gather(config.tracking.missing() if ranks.is_rank_zero else [])[0]:
        raise RunError("\n".join(lacks))
    tracker = None
    if ranks.is_rank_zero:
        tracker = Tracker(
            folder,
            name=config.name,
            config=config.model_dump(mode="json"),
            resume_step=sampler.step,
            tracking=config.tracking,
            others=[RayMetrics(config.name)],
            warn=ranks.log,
        )
    parts = {f"learning_rate_{part}": rate for part, rate in config.training.lr_per_part if rate is not None}
    return Monitor(
        ranks=ranks,
        folder=folder,
        tracker=tracker,
        report=report,
        members=[member.name for member in config.model.weak_encoders],
        start_progress=sampler.progress,
        max_steps=config.training.max_steps,
        log_every=config.training.log_every,
        max_bad_fraction=config.data.max_bad_fraction,
        max_skipped_steps=config.training.max_skipped_steps,
        learning_rates={"learning_rate": config.training.learning_rate, **parts},
        work=work,
    )


def _export(run: TrainRun, validation: Mapping[str, ValidationResult]) -> None:
    weights = run.engine.full_state_dict()
    if run.ranks.is_rank_zero:
        merge = run.config.model.merges_lora
        write_export(run.engine.model, run.processor, weights, run.folder, "export", merge=merge)
        scores = while_training({name: result.tasks for name, result in validation.items()})
        card = model_card(run.config.name, run.config.model_dump(mode="json"), scores, __version__)
        run.folder.write_text(f"export/{CARD}", card)
