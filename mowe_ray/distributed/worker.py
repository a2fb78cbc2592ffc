"""What each training process does: build, restore, train, validate, save, export."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint
from ray.util.queue import Queue

from mowe_ray.config import RunConfig
from mowe_ray.data.batch import MicroBatch
from mowe_ray.data.plan import Rows
from mowe_ray.data.report import DataReport
from mowe_ray.distributed.engine import DeepSpeedEngine, deepspeed_config
from mowe_ray.distributed.pipeline import decode_stream, prefetch
from mowe_ray.model import MoweProcessor
from mowe_ray.model.building import equal_members, strong_members
from mowe_ray.model.exporting import export
from mowe_ray.training.assemble import assemble, optimizer_groups, tokenizer_of
from mowe_ray.training.batch import Batch, collate
from mowe_ray.training.data_order import PlannedStep, TrainingOrder
from mowe_ray.training.errors import RunError
from mowe_ray.training.lanes import num_lanes, with_batches
from mowe_ray.training.loop import training_steps
from mowe_ray.training.monitor import Monitor
from mowe_ray.training.run_folder import RunFolder
from mowe_ray.training.sample_log import SampleLog
from mowe_ray.training.schedule import learning_rate_factor
from mowe_ray.training.sources import validation_plan
from mowe_ray.training.tracking import Tracker
from mowe_ray.training.validation import ValidationResult, validate

# Micro-batches collated ahead of the step that needs them.
_COLLATED_AHEAD = 4


@dataclass(frozen=True)
class WorkerSetup:
    """What the driver hands to every training process.

    Attributes:
        config: The run, as JSON.
        tokenizer: Content of tokenizer.json for a language model without one of its own.
        train_index: Index table of the training data, in the object store; validation_indexes by source name.
        report: What scanning the shards found.
        console: Lines for the person at the driver.
    """

    config: str
    tokenizer: str | None
    train_index: ray.ObjectRef
    validation_indexes: dict[str, ray.ObjectRef]
    report: DataReport
    console: Queue


def train_worker(settings: dict[str, WorkerSetup]) -> dict[str, Any]:
    """Train on this rank; returns the result of the run, or {"error": ...} if only the user can mend it."""
    try:
        return _train(settings["setup"])
    except RunError as error:  # raised by all ranks together: returning spares the pointless restarts
        return {"error": str(error)}
    except Exception as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1]  # travels to the driver as a note; tracebacks do not
        error.add_note(f"{innermost.filename}:{innermost.lineno}")
        raise


def _train(setup: WorkerSetup) -> dict[str, Any]:
    config = RunConfig.model_validate_json(setup.config)
    if config.compute.gpus_per_worker == 0:
        torch.set_num_threads(config.compute.cpus_per_worker)
    gpu = config.compute.gpus_per_worker > 0
    tokenizer = tokenizer_of(config.model, setup.tokenizer)
    model, processor = assemble(config.model, config.training.mowe_loss, seed=config.seed, tokenizer=tokenizer, gpu=gpu)
    if ray.train.get_context().get_world_rank() == 0:
        for warning in [*equal_members(model), *strong_members(model)]:
            setup.console.put(f"warning: {warning}")
    engine = DeepSpeedEngine(
        model,
        optimizer_groups(model, config.training),
        deepspeed_config(
            zero_stage=config.compute.zero_stage,
            clip_norm=config.training.clip_norm,
            bf16=model.dtype == torch.bfloat16,
            offload=config.compute.offload,
        ),
    )
    order = _training_order(setup, config, _restore(engine))
    monitor = _monitor(setup, config, engine, order)
    _run_steps(setup, config, engine, processor, order, monitor)
    validation = _validate(setup, config, engine, processor)
    monitor.validation(order.step, validation)
    _export(engine, processor, monitor.folder)
    monitor.finish(validation)
    return {
        "run": monitor.folder.url,
        "export": monitor.folder.path("export"),
        "steps": order.step,
        "epochs": order.epochs_finished,
        "tasks": _scores(validation),
    }


def _training_order(setup: WorkerSetup, config: RunConfig, state: dict[str, Any] | None) -> TrainingOrder:
    return TrainingOrder(
        ray.get(setup.train_index),
        config.data,
        seed=config.seed,
        lanes=num_lanes(config),
        epochs=config.training.epochs,
        max_steps=config.training.max_steps,
        warmup_steps=config.training.warmup_steps,
        state=state,
    )


def _run_steps(
    setup: WorkerSetup,
    config: RunConfig,
    engine: DeepSpeedEngine,
    processor: MoweProcessor,
    order: TrainingOrder,
    monitor: Monitor,
) -> None:
    """Train to the end of the run, with the checkpoints and validations on the way."""
    every, first_step = config.training, order.step + 1
    log = SampleLog(engine, monitor.folder, resume_step=order.step) if every.log_samples else None
    fed, planned_steps = tee(_with_batches(setup, config, processor, order, engine))
    steps = training_steps(engine, ((p.step, _factor(config, p), batches) for p, batches in fed), seed=config.seed)
    for result, (planned, _) in zip(steps, planned_steps, strict=False):  # in this order: a result tells of its step
        order.advance(planned)
        if result.step == first_step:
            _require_gradients(engine)
        monitor.step(result, share=planned.share, last=planned.last)
        if log is not None:
            log.add(result.step, planned.epoch, result.batches)
        if planned.last or (every.save_every and result.step % every.save_every == 0):
            if log is not None:
                log.flush()
            _save(engine, order)
        if not planned.last and every.eval_every and result.step % every.eval_every == 0:
            monitor.validation(result.step, _validate(setup, config, engine, processor))


def _factor(config: RunConfig, planned: PlannedStep) -> float:
    training = config.training
    return learning_rate_factor(planned.step - 1, training.warmup_steps, planned.decay, training.schedule)


def _scores(validation: dict[str, ValidationResult]) -> dict[str, dict[str, float]]:
    """Score and majority by task; by SOURCE/TASK where several validation sources have the task."""
    sources = Counter(task for result in validation.values() for task in result.tasks)
    return {
        task if sources[task] == 1 else f"{name}/{task}": {key: round(scores[key], 4) for key in ("score", "majority")}
        for name, result in validation.items()
        for task, scores in result.tasks.items()
    }


def _monitor(setup: WorkerSetup, config: RunConfig, engine: DeepSpeedEngine, order: TrainingOrder) -> Monitor:
    folder = RunFolder(config.storage, config.name)
    tracking = config.tracking
    return Monitor(
        ranks=engine,
        folder=folder,
        tracker=None
        if engine.rank
        else Tracker(
            folder,
            name=config.name,
            config=config.model_dump(mode="json"),
            resume_step=order.step,
            wandb_mode=tracking.wandb.mode,
            wandb_project=tracking.wandb.project,
            wandb_group=tracking.wandb.group,
            tensorboard=tracking.tensorboard,
        ),
        say=setup.console.put,
        report=setup.report,
        members=[member.name for member in config.model.weak_encoders],
        start_share=order.share,
        max_steps=config.training.max_steps,
        log_every=config.training.log_every,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def _export(engine: DeepSpeedEngine, processor: MoweProcessor, folder: RunFolder) -> None:
    weights = engine.full_state_dict()
    if engine.rank == 0:
        with tempfile.TemporaryDirectory(prefix="mowe_ray_export_") as local:
            export(engine.model, processor, local, state_dict=weights)
            folder.upload(Path(local), "export")


def _with_batches(
    setup: WorkerSetup, config: RunConfig, processor: MoweProcessor, order: TrainingOrder, engine: DeepSpeedEngine
) -> Iterator[tuple[PlannedStep, list[Batch]]]:
    """Yield the steps to come with this rank's collated micro-batches, prepared ahead in a thread."""

    def load(rows: Iterator[Rows]) -> Iterator[Batch]:
        decoded = _decoded(setup.train_index, rows, config)
        return prefetch((collate(micro_batch, processor) for micro_batch in decoded), _COLLATED_AHEAD)

    return with_batches(order, load, engine.rank, engine.world_size)


def _validate(
    setup: WorkerSetup, config: RunConfig, engine: DeepSpeedEngine, processor: MoweProcessor
) -> dict[str, ValidationResult]:
    results = {}
    for name, index in setup.validation_indexes.items():
        # One lane, dealt out: who shares a micro-batch, and so its padding, does not depend on the number of ranks.
        plan = [lanes[0] for lanes in validation_plan(ray.get(index), config.data, lanes=1)]
        plan += [np.zeros(0, np.int64)] * (-len(plan) % engine.world_size)
        rows = iter(plan[engine.rank :: engine.world_size])
        results[name] = validate(engine, processor, prefetch(_decoded(index, rows, config), _COLLATED_AHEAD))
    return results


def _decoded(index: ray.ObjectRef, rows: Iterator[Any], config: RunConfig) -> Iterator[MicroBatch]:
    return decode_stream(
        index,
        rows,
        min_duration_s=config.data.min_duration_s,
        max_duration_s=config.data.max_duration_s,
        decode_cpus=config.data.decode_cpus,
    )


def _restore(engine: DeepSpeedEngine) -> dict[str, Any] | None:
    """Load the newest checkpoint of this run, if any; returns the state of its training order."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return dict(engine.load(Path(folder))["order"])


def _save(engine: DeepSpeedEngine, order: TrainingOrder) -> None:
    # A folder of its own for each rank: Ray uploads everything it finds in it.
    folder = Path(tempfile.mkdtemp(prefix="mowe_ray_checkpoint_"))
    engine.save(folder, {"order": order.state(), "world_size": engine.world_size})
    ray.train.report({"step": order.step}, checkpoint=Checkpoint.from_directory(folder))
    shutil.rmtree(folder)


def _require_gradients(engine: DeepSpeedEngine) -> None:
    missing = sorted({name for names in engine.gather(engine.untouched_parameters()) for name in names})
    if missing:
        raise RunError(
            f"after the first step {len(missing)} trainable tensors have no gradient and would never learn: "
            f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}; "
            "train another part (model.train_base, model.weak_encoders.N.train, model.lora.target_modules)"
        )
