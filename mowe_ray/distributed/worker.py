"""What each training process does: build, restore, train, validate, save, export."""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint
from ray.util.queue import Queue

from mowe_ray.config import RunConfig
from mowe_ray.data.batch import MicroBatch
from mowe_ray.data.report import DataReport
from mowe_ray.distributed.engine import DeepSpeedEngine, deepspeed_config
from mowe_ray.distributed.pipeline import decode_stream, prefetch
from mowe_ray.distributed.sharded_loading import sharded_loading
from mowe_ray.model import MoweProcessor
from mowe_ray.model.building import equal_members, strong_members
from mowe_ray.model.exporting import export
from mowe_ray.training.assemble import assemble, model_dtype, optimizer_groups, tokenizer_of
from mowe_ray.training.batch import Batch, collate
from mowe_ray.training.data_order import rows_of_rank
from mowe_ray.training.errors import RunError
from mowe_ray.training.loop import training_steps
from mowe_ray.training.monitor import Monitor
from mowe_ray.training.run_folder import RunFolder
from mowe_ray.training.sources import training_plan, validation_plan
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
        total_steps: Optimizer steps of the whole run.
        train_index: Index table of the training data, in the object store; validation_indexes by source name.
        report: What scanning the shards found.
        console: Lines for the person at the driver.
    """

    config: str
    tokenizer: str | None
    total_steps: int
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
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if config.compute.gpus_per_worker == 0:
        torch.set_num_threads(config.compute.cpus_per_worker)
    gpu = config.compute.gpus_per_worker > 0
    tokenizer = tokenizer_of(config.model, setup.tokenizer)
    settings = deepspeed_config(
        zero_stage=config.compute.zero_stage,
        clip_norm=config.training.clip_norm,
        bf16=model_dtype(config.model, gpu) == torch.bfloat16,
        offload=config.compute.offload,
    )
    model, processor = assemble(
        config.model,
        config.training.mowe_loss,
        seed=config.seed,
        tokenizer=tokenizer,
        gpu=gpu,
        loading=sharded_loading(settings),
    )
    if rank == 0:
        for warning in [*equal_members(model), *strong_members(model)]:
            setup.console.put(f"warning: {warning}")
    engine = DeepSpeedEngine(model, optimizer_groups(model, config.training), settings)
    start_step = _restore(engine)
    monitor = _monitor(setup, config, engine, start_step)
    steps = training_steps(
        engine,
        _step_batches(setup, config, processor, start_step, rank, world_size),
        start_step=start_step,
        total_steps=setup.total_steps,
        warmup_steps=config.training.warmup_steps,
        schedule=config.training.schedule,
        seed=config.seed,
    )
    every = config.training
    for result in steps:
        if result.step == start_step + 1:
            _require_gradients(engine)
        monitor.step(result)
        last = result.step == setup.total_steps
        if last or (every.save_every and result.step % every.save_every == 0):
            _save(engine, result.step)
        if not last and every.eval_every and result.step % every.eval_every == 0:
            monitor.validation(result.step, _validate(setup, config, engine, processor))
    validation = _validate(setup, config, engine, processor)
    monitor.validation(setup.total_steps, validation)
    _export(engine, processor, monitor.folder)
    monitor.finish(validation)
    return {
        "run": monitor.folder.url,
        "export": monitor.folder.path("export"),
        "steps": setup.total_steps,
        "tasks": _scores(validation),
    }


def _scores(validation: dict[str, ValidationResult]) -> dict[str, dict[str, float]]:
    """Score and majority by task; by SOURCE/TASK where several validation sources have the task."""
    sources = Counter(task for result in validation.values() for task in result.tasks)
    return {
        task if sources[task] == 1 else f"{name}/{task}": {key: round(scores[key], 4) for key in ("score", "majority")}
        for name, result in validation.items()
        for task, scores in result.tasks.items()
    }


def _monitor(setup: WorkerSetup, config: RunConfig, engine: DeepSpeedEngine, start_step: int) -> Monitor:
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
            resume_step=start_step,
            wandb_mode=tracking.wandb.mode,
            wandb_project=tracking.wandb.project,
            wandb_group=tracking.wandb.group,
            tensorboard=tracking.tensorboard,
        ),
        say=setup.console.put,
        report=setup.report,
        members=[member.name for member in config.model.weak_encoders],
        start_step=start_step,
        total_steps=setup.total_steps,
        log_every=config.training.log_every,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def _export(engine: DeepSpeedEngine, processor: MoweProcessor, folder: RunFolder) -> None:
    weights = engine.full_state_dict()
    if engine.rank == 0:
        with tempfile.TemporaryDirectory(prefix="mowe_ray_export_") as local:
            export(engine.model, processor, local, state_dict=weights)
            folder.upload(Path(local), "export")


def _step_batches(
    setup: WorkerSetup, config: RunConfig, processor: MoweProcessor, start_step: int, rank: int, world_size: int
) -> Iterator[list[Batch]]:
    """Yield this rank's collated micro-batches of each step, prepared ahead in a thread."""
    lanes = world_size * config.training.gradient_accumulation
    rows = rows_of_rank(
        training_plan(ray.get(setup.train_index), config.data, seed=config.seed, lanes=lanes),
        start_step=start_step,
        total_steps=setup.total_steps,
        rank=rank,
        world_size=world_size,
    )
    decoded = _decoded(setup.train_index, rows, config)
    batches = prefetch((collate(micro_batch, processor) for micro_batch in decoded), _COLLATED_AHEAD)
    while step := list(islice(batches, config.training.gradient_accumulation)):
        yield step


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


def _restore(engine: DeepSpeedEngine) -> int:
    """Load the newest checkpoint of this run, if any; returns the steps finished before."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return int(engine.load(Path(folder))["step"])


def _save(engine: DeepSpeedEngine, step: int) -> None:
    # A folder of its own for each rank: Ray uploads everything it finds in it.
    folder = Path(tempfile.mkdtemp(prefix="mowe_ray_checkpoint_"))
    engine.save(folder, {"step": step, "world_size": engine.world_size})
    ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
    shutil.rmtree(folder)


def _require_gradients(engine: DeepSpeedEngine) -> None:
    missing = sorted({name for names in engine.gather(engine.untouched_parameters()) for name in names})
    if missing:
        raise RunError(
            f"after the first step {len(missing)} trainable tensors have no gradient and would never learn: "
            f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}; "
            "train another part (model.train_base, model.weak_encoders.N.train, model.lora.target_modules)"
        )
