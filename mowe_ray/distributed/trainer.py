"""The driver of a run: index the data, start the training processes, hand back the result."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from mowe_ray.config import RunConfig
from mowe_ray.distributed import cluster
from mowe_ray.distributed.pipeline import parallel_map
from mowe_ray.distributed.worker import WorkerSetup, train_worker
from mowe_ray.training.assemble import own_tokenizer
from mowe_ray.training.run_folder import RunFolder
from mowe_ray.training.sample_log import SAMPLES_FILE, check_samples
from mowe_ray.training.sources import index_sources

# A rank that keeps the others waiting longer is taken for lost.
_COLLECTIVE_TIMEOUT_S = 600

# What may change between two runs of the same command without making it another experiment.
_FREE_TO_CHANGE = {
    "training": {"max_steps", "epochs", "gradient_accumulation"}
    | {"eval_every", "save_every", "log_every", "keep_checkpoints", "max_skipped_steps", "step_timeout_s"},
    "compute": {"num_workers", "accelerator_type", "max_failures", "resize_interval_s", "cpus_per_worker"},
    "data": {"batch_seconds", "max_batch_size", "shuffle_buffer", "decode_cpus", "max_bad_fraction", "validation"},
}


def train(config: RunConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the training to its end, or continue it; returns the result, which `result.json` keeps.

    Args:
        config: The run.
        say: Shows a line of progress to the person who waits.

    Raises:
        ValueError: Something the user must change: the data, the resources, or a folder of another run.
    """
    folder = RunFolder(config.storage, config.name)
    compute = config.compute
    _claim(folder, config)
    cpus = compute.num_workers * (compute.cpus_per_worker + config.data.decode_cpus)
    cluster.join(cpus)
    cluster.check_resources(cpus, compute.num_workers * compute.gpus_per_worker)
    sources = index_sources(config.data, parallel_map)
    if folder.exists("result.json") and _finished(result := json.loads(folder.read_text("result.json")), config):
        say(f"{folder.url} is finished; choose another name to train again")
        return dict(result)
    console: Queue = Queue(actor_options={"num_cpus": 0})
    printer = threading.Thread(target=_relay, args=(console, say), daemon=True)
    printer.start()
    setup = WorkerSetup(
        config=config.model_dump_json(),
        tokenizer=own_tokenizer(config.model, sources.train, folder),
        train_index=ray.put(sources.train),
        validation_indexes={name: ray.put(index) for name, index in sources.validation.items()},
        report=sources.report,
        console=console,
    )
    result = _fit(config, folder, setup)
    console.put(None)
    printer.join()
    if "error" in result:
        raise ValueError(result["error"])
    if config.training.log_samples:
        weights = [source.weight for source in config.data.train]
        check = check_samples(
            sources.train, weights, folder.read_text(SAMPLES_FILE).splitlines(), epochs=result["epochs"]
        )
        say(str(check))
        result["samples"] = {"lost": check.lost, "repeated": check.repeated}
    folder.write_json("result.json", result)
    return result


def _finished(result: dict[str, Any], config: RunConfig) -> bool:
    """Whether the run that gave `result` was at least as long as `config` asks for."""
    length = config.training
    if length.max_steps is not None:
        return bool(result["steps"] >= length.max_steps)
    return bool(result["epochs"] >= (length.epochs or 0))


def _claim(folder: RunFolder, config: RunConfig) -> None:
    """Take the run folder, new or our own."""
    new = config.model_dump(mode="json")
    if folder.exists("config.json"):
        if not config.resume:
            raise ValueError(f"{folder.url} exists and resume=false: choose another name")
        differing = _first_difference(json.loads(folder.read_text("config.json")), new)
        if differing:
            raise ValueError(
                f"{folder.url} holds a run with another {differing}: choose another name, or go back to its value"
            )
    folder.write_json("config.json", new)


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    for section in ("seed", "model", "data", "training", "compute"):
        before, after = old.get(section), new[section]
        if not isinstance(after, dict):
            if before != after:
                return section
            continue
        for key, value in after.items():
            if key not in _FREE_TO_CHANGE.get(section, set()) and (before or {}).get(key) != value:
                return f"{section}.{key}"
    return None


def _fit(config: RunConfig, folder: RunFolder, setup: WorkerSetup) -> dict[str, Any]:
    compute = config.compute
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"setup": setup},
        torch_config=TorchConfig(
            backend="nccl" if compute.gpus_per_worker else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.num_workers,
            use_gpu=compute.gpus_per_worker > 0,
            resources_per_worker={"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker},
            accelerator_type=compute.accelerator_type,
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=folder.storage,
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.training.keep_checkpoints),
        ),
    )
    try:
        return dict(trainer.fit().return_value)
    except ray.train.TrainingFailedError as error:
        raise ValueError(f"training failed after {compute.max_failures} restarts: {_causes(error)}") from error


def _causes(error: ray.train.TrainingFailedError) -> str:
    """Say in a few lines what went wrong on which rank, where Ray would print every rank's traceback, cut off."""
    if not isinstance(error, ray.train.WorkerGroupError) or not error.worker_failures:
        return str(error)
    ranks: dict[str, list[int]] = {}
    for rank, failure in sorted(error.worker_failures.items()):
        # A failed Ray task carries its whole traceback as text, with the cause in the last line.
        told = (str(failure).strip().splitlines() or ["no message"])[-1]
        name = type(failure).__name__
        where = "".join(f" ({note})" for note in getattr(failure, "__notes__", [])[-1:])
        ranks.setdefault(f"{told if told.startswith(name) else f'{name}: {told}'}{where}", []).append(rank)
    lines = [f"rank {', '.join(map(str, who))}: {what}" for what, who in list(ranks.items())[:3]]
    logs = f"{ray.get_runtime_context().get_temp_dir()}/session_latest/logs/train"
    return "\n  ".join(["", *lines, f"full logs: {logs}, on the machine of the rank"])


def _relay(console: Queue, say: Callable[[str], None]) -> None:
    while (line := console.get()) is not None:
        say(line)
