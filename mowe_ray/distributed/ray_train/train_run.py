"""The steps of a run in one training process: train, save, validate, and react to failures and requests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle

from mowe_ray.config import RunConfig
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import BadSample
from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine
from mowe_ray.distributed.ray_data.pipeline import training_batches
from mowe_ray.distributed.ray_train.async_validation import AsyncValidation, validate_sources
from mowe_ray.distributed.ray_train.coordinator import RunCoordinator
from mowe_ray.distributed.ray_train.emergency_checkpoint import (
    EMERGENCY_SAVE_S,
    EmergencyCheckpointer,
    StopRequests,
    exit_if_terminated,
)
from mowe_ray.model import MoweProcessor
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.writer import CheckpointWriter
from mowe_ray.training.collate import Batch
from mowe_ray.training.fault_tolerance.out_of_memory import MicroBatchOutOfMemory, OutOfMemoryRecords, record, release
from mowe_ray.training.fault_tolerance.watchdog import ActivityTracker, Watchdog
from mowe_ray.training.loop import StepResult, training_steps
from mowe_ray.training.monitor import Monitor
from mowe_ray.training.optimizer import learning_rate_factor
from mowe_ray.training.protocols import Ranks, RunError
from mowe_ray.training.sample_audit import SampleAuditLog
from mowe_ray.training.sampler import EpochSampler, PlannedStep, rows_of_rank
from mowe_ray.training.validation import ValidationResult

# Seconds that the last checkpoint of a run may take to be written.
_LAST_CHECKPOINT_S = 600.0
# Longer than Ray waits between two reads (RAY_TRAIN_HEALTH_CHECK_INTERVAL_S), so that no report waits for Ray.
_REPORT_INTERVAL_S = 5.0


class RayReporter:
    """Reports metrics to Ray Train (`ray.train.report`), so that its callbacks and tools see the run.

    A report is a barrier of all ranks, and waits while Ray has not read the previous one. So metrics are collected, and
    reported at a checkpoint or validation at most every few seconds; never when a rank is in trouble or about to leave.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._reported = time.monotonic()

    def add_step(self, result: StepResult, planned: PlannedStep) -> None:
        """Replace the metrics of the previous step."""
        self._metrics |= {
            "step": result.step,
            "epoch": planned.epoch,
            "progress": planned.progress,
            **{name: getattr(result, name) for name in ("loss", "lm_loss", "routing_loss", "grad_norm", "audio_s")},
        }

    def add_validation(self, step: int, results: Mapping[str, ValidationResult]) -> None:
        """Replace the metrics of the previous validation; names are `SOURCE/loss` and `SOURCE/TASK`."""
        self._metrics["validation_step"] = step
        for source, result in results.items():
            scores = {f"{source}/{task}": values["score"] for task, values in result.tasks.items()}
            self._metrics |= {f"{source}/loss": result.loss, **scores}

    @property
    def due(self) -> bool:
        """Whether Ray has had the time to read the previous report; ranks differ in this."""
        return time.monotonic() - self._reported >= _REPORT_INTERVAL_S

    def report(self) -> None:
        """Report what was added. Collective."""
        ray.train.report(dict(self._metrics))
        self._reported = time.monotonic()


@dataclass(frozen=True)
class TrainRun:
    """The parts of a run on one rank.

    Attributes:
        train_index: Index of the training data, in the object store; validation_indexes by source name.
        feature_cache: The `FeatureCache` in the object store; None if the run has none.
        ranks: The processes of the run.
        records: Micro-batches that did not fit into memory before.
        sample_log: Log of all sample ids (`training.log_samples`), or None.
        async_validation: Validates while training goes on (`training.async_validation`).
        reporter: Reports metrics to Ray Train.
    """

    config: RunConfig
    folder: RunFolder
    train_index: ray.ObjectRef
    validation_indexes: dict[str, ray.ObjectRef]
    feature_cache: ray.ObjectRef | None
    processor: MoweProcessor
    engine: DeepSpeedEngine
    ranks: Ranks
    sampler: EpochSampler
    writer: CheckpointWriter
    monitor: Monitor
    records: OutOfMemoryRecords
    sample_log: SampleAuditLog | None
    async_validation: AsyncValidation
    reporter: RayReporter
    coordinator: ActorHandle[RunCoordinator]
    activity: ActivityTracker

    def train(self) -> bool:
        """Train to the end of the run; returns False if it was asked to stop before. Collective.

        Raises:
            RunError: On all ranks: only the user can fix it.
            MicroBatchOutOfMemory: A micro-batch did not fit; it is recorded for the restart.
        """
        with self._watched() as (watchdog, emergency):
            try:
                finished = self._steps(watchdog, emergency)
            except MicroBatchOutOfMemory as error:
                # Before the checkpoint, whose snapshot needs memory as well.
                release(error)
                self._record_out_of_memory(error)
                emergency.save_on_all_ranks()
                raise
            except RunError:
                self.writer.wait(EMERGENCY_SAVE_S)
                raise
        try:
            self.writer.wait(_LAST_CHECKPOINT_S, insist=True)
        except ValueError as error:  # every rank finds the same
            raise RunError(str(error)) from error
        return finished

    def validate(self) -> dict[str, ValidationResult]:
        """Validate for the last time, after a pending async validation; returns the results by source name.

        Collective.
        """
        with self._watched() as (watchdog, _):
            return self._validate(watchdog, wait_s=self.config.training.step_timeout_s)

    @contextmanager
    def _watched(self) -> Iterator[tuple[Watchdog, EmergencyCheckpointer]]:
        """Save and end, inside, what takes longer than its time limit. Collective."""
        emergency = EmergencyCheckpointer(
            engine=self.engine,
            ranks=self.ranks,
            save=self._save_now,
            coordinator=self.coordinator,
            folder=self.folder,
            activity=self.activity,
        )
        watchdog = Watchdog(self.activity, self.config.training.step_timeout_s, emergency.on_hang)
        try:
            yield watchdog, emergency
        finally:
            watchdog.close()
            emergency.close()

    def _validate(self, watchdog: Watchdog, wait_s: float = 0.0) -> dict[str, ValidationResult]:
        with self.activity.during("validating"):
            results = validate_sources(
                self.engine,
                self.processor,
                self.config,
                self.validation_indexes,
                self.feature_cache,
                known=self._killers,
                watched=partial(self._watched_batches, watchdog),
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            )
        watchdog.pause()
        self.async_validation.poll(self._report_validation, wait_s)
        self._report_validation(self.sampler.step, self.sampler.progress, results)
        return results

    def _validation_was_lost(self) -> bool:
        """Return whether the run ended between the checkpoint that it continues from and the validation then due."""
        step, every = self.sampler.step, self.config.training.eval_every
        due = bool(every) and step > 0 and step % every == 0 and self.sampler.progress < 1
        if not due or self.async_validation.is_pending(step):
            return False
        return not self.ranks.gather(self.monitor.validated(step, self.validation_indexes))[0]

    def _watched_batches(self, watchdog: Watchdog, source: str, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield `batches` of a validation source, each within the time limit of a step."""
        step = self.sampler.step
        what = f"a micro-batch of {source}, validated after step {step},"
        watchdog.begin(step, what)
        for batch in self.activity.waiting_for_data(batches):
            yield batch
            watchdog.begin(step, what)

    def _killers(self) -> list[BadSample]:
        return self.monitor.killers

    def _report_validation(self, step: int, progress: float, results: dict[str, ValidationResult]) -> None:
        self.monitor.validation(step, results)
        self.reporter.add_validation(step, results)
        if self.ranks.is_rank_zero:
            sources = [{"source": name, "loss": result.loss, "tasks": result.tasks} for name, result in results.items()]
            self.async_validation.report_to_driver({"step": step, "progress": progress, "sources": sources})

    def _steps(self, watchdog: Watchdog, emergency: EmergencyCheckpointer) -> bool:
        every, requests = self.config.training, StopRequests(self.coordinator, self.ranks)
        if self._validation_was_lost():
            self._validate(watchdog)
        # Two readers of one stream: the loop takes the batches, this method the planned step that each result belongs
        # to.
        fed, planned_steps = tee(self.activity.waiting_for_data(self._batches()))
        watchdog.begin(self.sampler.step + 1)
        dropped = len(self.config.model.weak_encoders) if every.pool_dropout else 0
        steps = training_steps(self.engine, map(self._with_factor, fed), seed=self.config.seed, dropped_pool=dropped)
        # Steps first: a result belongs to the planned step that was fed for it.
        for result, (planned, _) in zip(steps, planned_steps, strict=False):
            self.sampler.advance(planned)
            # After the position has moved: from here on weights and position belong to the same step.
            emergency.step_finished()
            self._report_step(result, planned)
            self.async_validation.poll(self._report_validation)
            # Once a step, on all ranks: what only some of them know becomes a decision of all.
            stop, save, report = requests.synchronize(report_due=self.reporter.due)
            saving = bool(every.save_every) and result.step % every.save_every == 0
            validating = bool(every.eval_every) and result.step % every.eval_every == 0
            if stop or save or planned.last or saving:
                self._save()
            if save:
                self.writer.wait(EMERGENCY_SAVE_S)
                exit_if_terminated()
            if planned.last or stop:
                return planned.last
            if validating:
                watchdog.pause()
                if not self.async_validation.start(self.sampler.step, self.sampler.progress):
                    self._validate(watchdog)
            watchdog.begin(result.step + 1)
            # Not while a node is about to leave: a report is a barrier, and the ranks on that node may never reach it.
            if report and (saving or validating) and not save:
                with self.activity.during("ray.train.report"):
                    self.reporter.report()
        return True  # there was nothing left to train

    def _batches(self) -> Iterator[tuple[PlannedStep, list[Batch]]]:
        return training_batches(
            self.train_index,
            self.config,
            self.processor,
            self.sampler,
            cache=self.feature_cache,
            known=self._killers,
            change=self.records.apply,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )

    def _with_factor(self, fed: tuple[PlannedStep, list[Batch]]) -> tuple[int, float, list[Batch]]:
        (planned, batches), training = fed, self.config.training
        # The first batch after a start: data, the last phase of a recovery, have arrived.
        if self.engine.updates == 0 and self.ranks.is_rank_zero:
            self.monitor.recovered(self.sampler.step, ray.get(self.coordinator.end_recovery_phase.remote("data")))
        factor = learning_rate_factor(planned.step - 1, training.warmup_steps, planned.decay, training.schedule)
        return planned.step, factor, batches

    def _report_step(self, result: StepResult, planned: PlannedStep) -> None:
        """Report a step to the coordinator, the sample log and the monitor. Collective."""
        if self.engine.updates == 1:
            _require_gradients(self.engine)
        if self.ranks.is_rank_zero:
            self.coordinator.step_finished.remote()
        if self.sample_log is not None:
            self.sample_log.add(result.step, planned.epoch, result.batches)
        self.monitor.step(result, progress=planned.progress, last=planned.last)
        self.reporter.add_step(result, planned)

    def _save(self) -> None:
        """Start to write a checkpoint of the last finished step. Not collective."""
        self.writer.save(self.sampler.step, self.engine.snapshot(), self.sampler.snapshot(), self._flush)

    def _flush(self) -> None:
        """Write the records so far: a run that continues from the checkpoint finds those of all its steps."""
        if self.sample_log is not None:
            self.sample_log.flush()
        self.monitor.flush()

    def _save_now(self) -> bool:
        self._save()
        return self.writer.wait(EMERGENCY_SAVE_S)

    def _record_out_of_memory(self, error: MicroBatchOutOfMemory) -> None:
        """Record which micro-batch did not fit: after the restart all ranks change the plan for it."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        # The sampler still stands at the step that failed, so that its next plan is the one that did not fit.
        mine = rows_of_rank(self.records.apply(next(iter(self.sampler)).micro_batches), rank, world_size)
        event = record(self.folder, error, rank=rank, rows=mine[error.slot // world_size])
        ray.get(self.coordinator.log.remote(self.records.line(event)))


def _require_gradients(engine: DeepSpeedEngine) -> None:
    missing = sorted({name for names in engine.gather(engine.untouched_parameters()) for name in names})
    if missing:
        raise RunError(
            f"after the first step {len(missing)} trainable tensors have no gradient and would never learn: "
            f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}; "
            "train another part (model.train_base, model.weak_encoders.N.train, model.lora.target_modules)"
        )
