"""Ray Train: start the worker group, restart it after failures, resize it, and stop it on signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import remove_placement_group

from mowe_ray.config import RunConfig
from mowe_ray.distributed.errors import format_failures, format_training_failure
from mowe_ray.distributed.ray_internals import WorkerGroupCallback
from mowe_ray.distributed.ray_train.coordinator import RunCoordinator, WorkerSetup
from mowe_ray.distributed.ray_train.emergency_checkpoint import EMERGENCY_SAVE_S, SaveOnSigterm
from mowe_ray.distributed.resources import bundle_of
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.layout import committed_steps
from mowe_ray.training.fault_tolerance.restart_policy import RestartDecision, RestartPolicy
from mowe_ray.training.fault_tolerance.supervisor import stop_signals_handled


def fit(config: RunConfig, folder: RunFolder, setup: WorkerSetup, log: Callable[[str], None]) -> dict[str, Any]:
    """Train on a group of workers through all failures; returns what rank 0 returned.

    Ray restarts the group `compute.max_failures` times. When that is used up, or when Ray's own controller has died,
    the `RestartPolicy` decides whether there is another group.

    Raises:
        ValueError: It failed too often without a new checkpoint; the message has the last cause.
    """
    policy = RestartPolicy(config.compute.max_failures)
    while True:
        # Before the attempt: a newer checkpoint after it is what counts as progress.
        reached = committed_steps(folder)
        try:
            return dict(_trainer(config, folder, setup).fit().return_value)
        except ray.train.TrainingFailedError as error:
            cause, attempts = format_training_failure(error), config.compute.max_failures + 1  # Ray has retried
        except ray.exceptions.RayActorError as error:
            cause, attempts = f"the training controller died: {str(error).splitlines()[0]}", 1
            # The controller would have removed it; while it exists, the next group cannot get the same resources.
            if held := ray.get(setup.coordinator.placement_group.remote()):
                remove_placement_group(held)
            ray.get(setup.coordinator.set_placement_group.remote(None))
            if ray.get(setup.coordinator.controller_killed.remote()):
                return {"run": folder.url, "stopped_at_step": max(committed_steps(folder), default=0)}
        progressed = committed_steps(folder)[-1:] != reached[-1:]
        policy = policy.after_failure(progressed=progressed, attempts=attempts)
        if policy.decision is RestartDecision.GIVE_UP:
            raise ValueError(
                f"training failed after {config.compute.max_failures} restarts without a new checkpoint "
                f"(compute.max_failures): {cause}"
            )
        log(f"warning: {cause}; starting the workers again")


def _trainer(config: RunConfig, folder: RunFolder, setup: WorkerSetup) -> TorchTrainer:
    compute = config.compute
    return TorchTrainer(
        _train_worker,
        train_loop_config={"setup": setup},
        # Longer than the watchdog waits: it reports first, since it knows where the ranks are.
        torch_config=backend(config, timeout_s=int(config.training.step_timeout_s + 2 * EMERGENCY_SAVE_S)),
        scaling_config=scaling(
            config, (compute.min_workers, compute.max_workers) if compute.elastic else compute.max_workers
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=folder.storage,
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            callbacks=[_ReportFailures(setup.coordinator), _RegisterPlacementGroup(setup.coordinator), SaveOnSigterm()],
        ),
    )


def scaling(config: RunConfig, num_workers: int | tuple[int, int]) -> ray.train.ScalingConfig:
    """Return the placement of so many workers; a range is resized by Ray as nodes come and go."""
    compute, bundle = config.compute, bundle_of(config)
    return ray.train.ScalingConfig(
        num_workers=num_workers,
        elastic_resize_monitor_interval_s=compute.resize_interval_s,
        use_gpu=compute.gpus_per_worker > 0,
        resources_per_worker={"CPU": bundle["CPU"], "GPU": bundle.get("GPU", 0)},
        accelerator_type=compute.accelerator_type,
    )


def backend(config: RunConfig, timeout_s: int) -> TorchConfig:
    """Return the process group of the workers."""
    return TorchConfig(backend="nccl" if config.compute.gpus_per_worker else "gloo", timeout_s=timeout_s)


def _train_worker(settings: dict[str, WorkerSetup]) -> dict[str, Any]:
    # Here, because drivers and Ray's controller, many of them in a study, need neither the model nor DeepSpeed.
    from mowe_ray.distributed.ray_train.worker import train_worker

    return train_worker(settings["setup"])


class _ReportFailures(UserCallback):
    """Logs that workers have failed, and starts to time the recovery; runs in Ray's controller."""

    def __init__(self, coordinator: ActorHandle[RunCoordinator]):
        self._coordinator = coordinator

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray after a failure."""
        self._coordinator.failure_detected.remote()
        self._coordinator.log.remote(f"warning: workers failed:{format_failures(worker_exceptions)}")


class _RegisterPlacementGroup(WorkerGroupCallback):
    """Registers the workers' placement group, for the driver to remove it if the controller dies.

    Ray has a cleaner of its own for this, which does not find its cluster where a machine runs several (Ray 2.60).
    """

    def __init__(self, coordinator: ActorHandle[RunCoordinator]):
        self._coordinator = coordinator

    def before_worker_group_start(self, worker_group_context: object) -> None:
        """Register the controller, which may wait for nodes; called in it, like the others."""
        ray.get(self._coordinator.set_controller.remote(ray.get_runtime_context().current_actor))

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Register the placement group."""
        handle = worker_group.get_worker_group_state().placement_group_handle
        ray.get(self._coordinator.set_placement_group.remote(handle.placement_group))

    def after_worker_group_shutdown(self, worker_group_context: object) -> None:
        """Forget the placement group; also called after a failure."""
        ray.get(self._coordinator.set_placement_group.remote(None))


@contextmanager
def stop_on_signals(coordinator: ActorHandle[RunCoordinator], log: Callable[[str], None]) -> Iterator[list[int]]:
    """Let SIGTERM, SIGINT and SIGHUP save and end the run inside; a second SIGINT ends the process at once.

    Yields:
        The signals that came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread can
        yield came
        return

    def stop(number: int) -> None:
        if number in came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        if len(came) == 1:
            coordinator.stop.remote()  # before the line, which may block
            log(f"{signal.Signals(number).name}: saving and stopping after this step")

    with stop_signals_handled(stop):
        yield came


def in_thread(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` returns, computed in another thread: the main thread handles signals meanwhile."""
    future: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            future.set_exception(error)

    # Not a ThreadPoolExecutor: Python waits for its threads at exit, so a second Ctrl-C could not end the process.
    threading.Thread(target=run, daemon=True, name="fit").start()
    return future.result()
