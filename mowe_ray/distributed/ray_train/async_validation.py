"""Async validation: while training goes on, an actor validates an export of the step on free resources.

Ray Train's own validation (`ValidationConfig`) starts from checkpoints that workers report to it. Ours are files that
are not reported (decision 5), so this is a plain actor. Rank 0 owns it: it ends with the workers, and the export stays
for the workers that resume the run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from mowe_ray.config import RunConfig
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import BadSample
from mowe_ray.distributed import resources
from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.ray_data.batch_inference import local_copy
from mowe_ray.distributed.ray_data.pipeline import validation_batches
from mowe_ray.distributed.ray_train.coordinator import WorkerSetup
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.build import model_dtype, write_export
from mowe_ray.training.checkpoint.layout import VALIDATING_FOLDER
from mowe_ray.training.protocols import EvaluationEngine, OneProcess, Ranks
from mowe_ray.training.validation import ValidationResult, validate

Results = dict[str, ValidationResult]

# Written last: an export without it is incomplete.
_PENDING_FILE = "pending.json"
# Longer than a process takes to start; an actor that has not started by then found its resources taken.
_START_S = 60.0
# Seconds that Ray may take to notice that the resources of the previous validation are free.
_RELEASE_S = 2.0


def validate_sources(
    engine: EvaluationEngine,
    processor: MoweProcessor,
    config: RunConfig,
    indexes: dict[str, ray.ObjectRef],
    cache: ray.ObjectRef | None,
    *,
    known: Callable[[], Sequence[BadSample]],
    watched: Callable[[str, Iterable[MicroBatch]], Iterable[MicroBatch]] = lambda _name, batches: batches,
    rank: int = 0,
    world_size: int = 1,
) -> Results:
    """Validate on every source, by its name. Collective.

    Args:
        known: Returns the samples that are known to be bad by now, which are not tried.
        watched: Returns the micro-batches of a source, watched while they are used.
    """
    results = {}
    for name, index in indexes.items():
        batches = validation_batches(index, config, cache=cache, known=known, rank=rank, world_size=world_size)
        results[name] = validate(engine, processor, watched(name, batches), config.data.max_text_tokens)
    return results


@dataclass(frozen=True)
class _Pending:
    """A step that is being validated, and the fraction of the run that was done at that step."""

    step: int
    progress: float

    @property
    def export(self) -> str:
        return f"{VALIDATING_FOLDER}/step-{self.step:08d}"

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "share": self.progress}

    @classmethod
    def read(cls, folder: RunFolder, file: str) -> _Pending | None:
        """Return what is pending by its file; None if there is none, or it is damaged."""
        value = folder.find_json(file, "step", "share")
        return None if value is None else cls(value["step"], value["share"])


class AsyncValidation:
    """Validates one step at a time while training goes on (`training.async_validation`).

    Every rank knows which step is pending. While one is, the workers validate later steps themselves, rather than wait
    for it or skip them. An error costs the pending validation and logs a warning; it never interrupts training.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        config: RunConfig,
        folder: RunFolder,
        engine: DeepSpeedEngine,
        processor: MoweProcessor,
        ranks: Ranks,
        *,
        resume_step: int,
    ):
        """Restart the validation that a run that resumes after `resume_step` has left pending. Collective."""
        self._setup, self._config, self._folder, self._ranks = setup, config, folder, ranks
        self._engine, self._processor = engine, processor
        self._warned_no_room, self._released = False, -_RELEASE_S
        self._unreported: list[dict[str, Any]] = []
        # Rank 0 alone looks at storage and at the cluster; the others take over what it has found.
        left = self._left_over(resume_step) if ranks.is_rank_zero else None
        self._pending: _Pending | None = ranks.gather(left)[0]

    def is_pending(self, step: int) -> bool:
        """Return whether the model after `step` is being validated. The same on all ranks."""
        return self._pending is not None and self._pending.step == step

    def start(self, step: int, progress: float) -> bool:
        """Start to validate the present model; returns whether that was possible. Collective."""
        possible = (
            self._config.training.async_validation and bool(self._setup.validation_indexes) and self._pending is None
        )
        if not possible or not self._ranks.gather(self._ranks.is_rank_zero and self._has_room())[0]:
            return False
        pending = _Pending(step, progress)
        # On all ranks: under ZeRO-3 every rank has to gather its shards.
        weights = self._engine.full_state_dict()
        started = self._ranks.is_rank_zero and self._export(pending, weights)
        self._pending = pending if self._ranks.gather(started)[0] else None
        return self._pending is not None

    def poll(self, on_results: Callable[[int, float, Results], None], wait_s: float = 0.0) -> None:
        """Call `on_results` with step, progress and results, on all ranks, if the validation has ended. Collective.

        Args:
            wait_s: Wait up to so many seconds for its end, and give it up then; 0 does not wait.
        """
        if self._pending is None:
            return
        results = self._ranks.gather(self._results(wait_s) if self._ranks.is_rank_zero else None)[0]
        if results is None:
            return
        pending, self._pending = self._pending, None
        if results:
            on_results(pending.step, pending.progress, results)
        if self._ranks.is_rank_zero:
            self._send_reports()
            self._remove()

    def report_to_driver(self, validation: dict[str, Any]) -> None:
        """Send a validation to the driver, after that of an earlier step: schedulers of a study need them in order."""
        self._unreported.append(validation)
        if self._pending is None:
            self._send_reports()

    def _send_reports(self) -> None:
        for validation in sorted(self._unreported, key=lambda validation: int(validation["step"])):
            self._setup.coordinator.add_validation.remote(validation)
        self._unreported = []

    def _has_room(self) -> bool:
        bundle, elsewhere = resources.bundle_of(self._config), resources.unreserved_decode_cpus(self._config)
        # Ray returns the resources of the previous validation some time after its actor was killed.
        while not (room := resources.has_room(bundle, elsewhere)) and time.monotonic() - self._released < _RELEASE_S:
            time.sleep(0.1)
        if not room and not self._warned_no_room:
            self._warned_no_room = True
            gpus = f" and {bundle['GPU']:g} GPU" if "GPU" in bundle else ""
            decoding = f", or the cluster {elsewhere} more to decode" if elsewhere else ""
            self._ranks.log(
                f"no node has {bundle['CPU']:g} CPUs{gpus} to spare{decoding}: workers stop to validate "
                "(training.async_validation)"
            )
        return room

    def _export(self, pending: _Pending, weights: dict[str, torch.Tensor]) -> bool:
        try:
            merge = self._config.model.merges_lora
            write_export(self._engine.model, self._processor, weights, self._folder, pending.export, merge=merge)
            self._folder.write_json(f"{pending.export}/{_PENDING_FILE}", pending.to_json())
        except Exception as error:  # noqa: BLE001 - each storage raises its own; the workers validate then
            self._ranks.log(
                f"warning: step {pending.step} could not be exported, so workers stop to validate it: {error}"
            )
            self._remove()
            return False
        self._launch(pending)
        return True

    def _launch(self, pending: _Pending) -> None:
        self._actor: ActorHandle[_Validator] = _Validator.options(  # type: ignore[attr-defined]
            scheduling_strategy="DEFAULT",  # not on what the workers, or a Tune trial, have reserved
            **resources.ray_options(resources.bundle_of(self._config)),
        ).remote()
        # A second reference shows whether the actor has started: its resources may have been taken since `_has_room`.
        self._started = self._actor.__ray_ready__.remote()
        self._result = self._actor.validate.remote(self._setup, self._folder.path(pending.export))

    def _results(self, wait_s: float) -> Results | None:
        """Return the results of what is pending, empty if there will be none, None if it has not ended."""
        assert self._pending is not None
        started, _ = ray.wait([self._started], timeout=min(wait_s, _START_S))
        ended, _ = ray.wait([self._result], timeout=wait_s if started else 0)
        results: Results = {}
        try:
            if not ended and not wait_s:
                return None
            if ended:
                results = ray.get(self._result)
            else:
                late = f"did not end within {wait_s:g} s (training.step_timeout_s)"
                self._warn(self._pending.step, late if started else "found its resources taken")
        except ray.exceptions.RayError as error:
            self._warn(self._pending.step, f"failed: {cause_of(error)}")
        # At once, not when the last reference goes: the next validation needs the same resources.
        ray.kill(self._actor)
        self._released = time.monotonic()
        return results

    def _warn(self, step: int, what: str) -> None:
        self._ranks.log(f"warning: the async validation of step {step} {what}; training goes on without it")

    def _remove(self) -> None:
        try:
            self._folder.remove(VALIDATING_FOLDER)
        except Exception as error:  # noqa: BLE001 - each storage raises its own; it costs space alone
            self._ranks.log(f"warning: {self._folder.path(VALIDATING_FOLDER)} could not be removed: {error}")

    def _left_over(self, resume_step: int) -> _Pending | None:
        records = self._folder.read_records("metrics.jsonl", "kind", "step")
        validated = {record["step"] for record in records if record["kind"] == "validation"}
        for name in self._folder.names(VALIDATING_FOLDER):
            pending = _Pending.read(self._folder, f"{VALIDATING_FOLDER}/{name}/{_PENDING_FILE}")
            # A later step is trained, and validated, again.
            if pending is None or pending.step in validated or pending.step > resume_step:
                continue
            if self._config.training.async_validation and self._has_room():
                self._launch(pending)
                return pending
            self._warn(pending.step, "was interrupted and has no room now")
        self._remove()
        return None


@ray.remote
class _Validator:
    """Validates one export; the process ends afterwards, which frees all its memory."""

    def validate(self, setup: WorkerSetup, export: str) -> Results:
        """Validate on every source as the workers would, except that adapters are merged into the weights."""
        config = setup.config
        gpu = config.compute.gpus_per_worker > 0
        if not gpu:
            torch.set_num_threads(config.compute.cpus_per_worker)
        folder = local_copy(export)
        try:
            dtype = model_dtype(config.model, gpu)
            model = MoweForConditionalGeneration.from_pretrained(folder, dtype=dtype).to("cuda" if gpu else "cpu")
            processor = MoweProcessor.from_pretrained(folder)
        finally:
            if folder != export:
                shutil.rmtree(folder, ignore_errors=True)
        return validate_sources(
            OneProcess(model),
            processor,
            config,
            setup.validation_indexes,
            setup.feature_cache,
            known=lambda: setup.report.killers,
        )
