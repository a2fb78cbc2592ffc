"""The steps of a run in one training process: train, save, validate on the way, and act on what happens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee

import ray
from ray.actor import ActorHandle

from mowe_ray.config import RunConfig
from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine
from mowe_ray.distributed.ray_data.pipeline import training_batches
from mowe_ray.distributed.ray_train.async_validation import ValidationBeside, validate_sources
from mowe_ray.distributed.ray_train.control import Control
from mowe_ray.distributed.ray_train.emergency_checkpoint import RESCUE_S, Rescue, Wishes, leave_if_terminated
from mowe_ray.model import MoweProcessor
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.writer import CheckpointWriter
from mowe_ray.training.collate import Batch
from mowe_ray.training.fault_tolerance.out_of_memory import MicroBatchOutOfMemory, Records, record, release
from mowe_ray.training.fault_tolerance.watchdog import Watchdog, Whereabouts
from mowe_ray.training.loop import StepResult, training_steps
from mowe_ray.training.monitor import Monitor
from mowe_ray.training.optimizer import learning_rate_factor
from mowe_ray.training.protocols import RunError
from mowe_ray.training.sample_audit import SampleLog
from mowe_ray.training.sampler import PlannedStep, TrainingOrder, rows_of_rank
from mowe_ray.training.validation import ValidationResult

# How long the last checkpoint of a run, or of a run that is told to stop, may take to be written.
_LAST_CHECKPOINT_S = 600.0


@dataclass(frozen=True)
class Run:
    """The parts of a run that is under way, on one rank.

    Attributes:
        train_index: Index of the training data, in the object store; validation_indexes by source name.
        feature_cache: What need not be computed, likewise; None without such a cache.
        records: Micro-batches that did not fit into memory before.
        log: Where the ids of all samples go, if that was asked for.
        beside: Validates while training goes on, where that is asked for and possible.
    """

    config: RunConfig
    folder: RunFolder
    train_index: ray.ObjectRef
    validation_indexes: dict[str, ray.ObjectRef]
    feature_cache: ray.ObjectRef | None
    processor: MoweProcessor
    engine: DeepSpeedEngine
    order: TrainingOrder
    writer: CheckpointWriter
    monitor: Monitor
    records: Records
    log: SampleLog | None
    beside: ValidationBeside
    control: ActorHandle[Control]
    whereabouts: Whereabouts

    def train(self) -> bool:
        """Train to the end of the run; returns False if told to stop before. Collective.

        Raises:
            RunError: On all ranks: only the user can mend it.
            MicroBatchOutOfMemory: A micro-batch did not fit; it is written down for the next start.
        """
        rescue = Rescue(engine=self.engine, save=self._save_now, control=self.control, folder=self.folder)
        dog = Watchdog(self.whereabouts, self.config.training.step_timeout_s, rescue.hang)
        try:
            finished = self._steps(dog, rescue)
        except MicroBatchOutOfMemory as error:
            release(error)
            self._write_down(error)
            rescue.call()
            raise
        except RunError:
            self.writer.wait(RESCUE_S)
            raise
        finally:
            dog.close()
        try:
            self.writer.wait(_LAST_CHECKPOINT_S, insist=True)
        except ValueError as error:  # every rank finds the same
            raise RunError(str(error)) from error
        return finished

    def validate(self, *, last: bool = False) -> dict[str, ValidationResult]:
        """Validate on every source, by its name, and tell of it; the `last` time after all others. Collective."""
        results = validate_sources(
            self.engine,
            self.processor,
            self.config,
            self.validation_indexes,
            self.feature_cache,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
        )
        self.beside.hear(self._tell_validation, self.config.training.step_timeout_s if last else 0.0)
        self._tell_validation(self.order.step, self.order.share, results)
        return results

    def _tell_validation(self, step: int, share: float, results: dict[str, ValidationResult]) -> None:
        self.monitor.validation(step, results)
        if self.engine.rank == 0:
            told = [{"source": name, "loss": result.loss, "tasks": result.tasks} for name, result in results.items()]
            self.beside.tell_driver({"step": step, "share": share, "sources": told})

    def _steps(self, dog: Watchdog, rescue: Rescue) -> bool:
        every, wishes = self.config.training, Wishes(self.control)
        fed, planned_steps = tee(self.whereabouts.watch(self._batches(), "waiting for data"))
        dog.begin(self.order.step + 1)
        steps = training_steps(self.engine, map(self._with_factor, fed), seed=self.config.seed)
        # Steps first: a result tells of the step that was fed for it.
        for result, (planned, _) in zip(steps, planned_steps, strict=False):
            self.order.advance(planned)
            rescue.step_finished()
            self._tell(result, planned)
            self.beside.hear(self._tell_validation)
            stop, save = wishes.agree(self.engine)
            if stop or save or planned.last or (every.save_every and result.step % every.save_every == 0):
                self._save()
            if save:
                self.writer.wait(RESCUE_S)
                leave_if_terminated()
            if planned.last or stop:
                return planned.last
            if every.eval_every and result.step % every.eval_every == 0:
                dog.pause()
                if not self.beside.start(self.order.step, self.order.share):
                    self.validate()
            dog.begin(result.step + 1)
        return True  # there was nothing left to train

    def _batches(self) -> Iterator[tuple[PlannedStep, list[Batch]]]:
        return training_batches(
            self.train_index,
            self.config,
            self.processor,
            self.order,
            cache=self.feature_cache,
            change=self.records.apply,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
        )

    def _with_factor(self, fed: tuple[PlannedStep, list[Batch]]) -> tuple[int, float, list[Batch]]:
        (planned, batches), training = fed, self.config.training
        if self.engine.updates == 0 and self.engine.rank == 0:
            self.monitor.recovered(self.order.step, ray.get(self.control.recovered.remote("data")))
        factor = learning_rate_factor(planned.step - 1, training.warmup_steps, planned.decay, training.schedule)
        return planned.step, factor, batches

    def _tell(self, result: StepResult, planned: PlannedStep) -> None:
        """Report a step to whoever wants to know of it."""
        if self.engine.updates == 1:
            _require_gradients(self.engine)
        if self.engine.rank == 0:
            self.control.step_finished.remote()
        if self.log is not None:
            self.log.add(result.step, planned.epoch, result.batches)
        self.monitor.step(result, share=planned.share, last=planned.last)

    def _save(self) -> None:
        """Start to write a checkpoint of the last finished step. Not collective."""
        # A run that continues from the checkpoint finds the logged samples of all its steps.
        before = None if self.log is None else self.log.flush
        self.writer.save(self.order.step, self.engine.snapshot(), self.order.state(), before)

    def _save_now(self) -> bool:
        self._save()
        return self.writer.wait(RESCUE_S)

    def _write_down(self, error: MicroBatchOutOfMemory) -> None:
        """Note which micro-batch did not fit: after the restart all ranks change the plan for it."""
        rank, world_size = self.engine.rank, self.engine.world_size
        mine = rows_of_rank(self.records.apply(next(iter(self.order)).lanes), rank, world_size)
        event = record(self.folder, error, rank=rank, rows=mine[error.lane // world_size])
        ray.get(self.control.say.remote(self.records.line(event)))


def _require_gradients(engine: DeepSpeedEngine) -> None:
    missing = sorted({name for names in engine.gather(engine.untouched_parameters()) for name in names})
    if missing:
        raise RunError(
            f"after the first step {len(missing)} trainable tensors have no gradient and would never learn: "
            f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}; "
            "train another part (model.train_base, model.weak_encoders.N.train, model.lora.target_modules)"
        )
