"""The compute cost of trials before any is trained: operations, and the time that devices take for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mowe_ray.config import RunConfig
from mowe_ray.config.schema import ComputeSection
from mowe_ray.data.scan import map_in_child
from mowe_ray.sweeping.trials import ModelCost
from mowe_ray.training.datasets import scan_sources

CLIP_S = 30.0  # `ModelCost.gflops` is for a clip of this length
_FORWARD_AND_BACKWARD = 3
# Dense bfloat16 TFLOP/s, from the vendors' data sheets.
_PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
_REACHED = 0.4  # of that peak, in training
_ASSUMED = "H100"
# TFLOP/s of one core, measured: four epochs of the quickstart, whose layers are small; larger ones run faster.
_CPU_CORE = 0.012


@dataclass(frozen=True)
class Epoch:
    """A pass over the weighted mixture: `clips`, and `seconds` of audio."""

    clips: float
    seconds: float


@dataclass(frozen=True)
class Audio:
    """Audio that a trial trains on: `seconds` in its complete run, as an upper bound if `at_most`."""

    seconds: float
    at_most: bool


@dataclass(frozen=True)
class Device:
    """The device of a worker: its sustained TFLOP/s, and where that number comes from; None if unknown."""

    name: str
    teraflops: float | None
    source: str


class ComputeCost:
    """The cost of configurations; equal models are counted, and equal data scanned, once.

    Args:
        cost: Returns what the model of a configuration costs; None if that is not known.
    """

    def __init__(self, cost: Callable[[RunConfig], ModelCost | None]):
        self._cost = cost
        self._costs: dict[str, ModelCost | None] = {}
        self._epochs: dict[str, Epoch] = {}

    def cost(self, config: RunConfig) -> ModelCost | None:
        """Return what its model costs; None if that is not known."""
        # By content: trials that differ in seeds or learning rates share a model.
        key = config.model.model_dump_json()
        if key not in self._costs:
            self._costs[key] = self._cost(config)
        return self._costs[key]

    def epoch(self, config: RunConfig) -> Epoch | None:
        """Return the size of an epoch; None without `data.train`.

        Raises:
            ValueError: A path holds no shards.
        """
        if not config.data.train:
            return None
        key = config.data.model_dump_json()
        if key not in self._epochs:
            train = scan_sources(config.data, map_in_child).train
            passes = np.array([source.weight for source in config.data.train])[train.sources]
            self._epochs[key] = Epoch(float(passes.sum()), float((train.durations * passes).sum()))
        return self._epochs[key]

    def audio(self, config: RunConfig) -> Audio | None:
        """Return the audio a run trains on; None where that depends on data that are not given.

        Raises:
            ValueError: A path holds no shards.
        """
        training, data, epoch = config.training, config.data, self.epoch(config)
        if training.epochs is not None:
            return None if epoch is None else Audio(training.epochs * epoch.seconds, at_most=False)
        assert training.max_steps is not None
        step_s = data.batch_seconds
        if epoch is not None and epoch.clips:
            step_s = min(step_s, data.max_batch_size * epoch.seconds / epoch.clips)
        return Audio(training.max_steps * config.micro_batches_per_step * step_s, at_most=True)

    def petaflop(self, config: RunConfig) -> float | None:
        """Return 1e15 operations of a run, forward and backward; None if its model or its data is not known."""
        cost, audio = self.cost(config), self.audio(config)
        if cost is None or audio is None:
            return None
        return _FORWARD_AND_BACKWARD * cost.gflops * audio.seconds / CLIP_S / 1e6


def device(compute: ComputeSection) -> Device:
    """Return the device of a worker."""
    if not compute.gpus_per_worker:
        cores = compute.cpus_per_worker
        source = f"{1e3 * _CPU_CORE:g} GFLOP/s a core, measured with the quickstart"
        return Device("CPU core" if cores == 1 else f"{cores} CPU cores", cores * _CPU_CORE, source)
    kind = compute.accelerator_type or _ASSUMED
    peak = _PEAK.get(kind.partition("-")[0])  # Ray calls some A100-80G
    if peak is None:
        return Device(kind, None, f"unknown: no peak of {kind} is kept here")
    assumed = "" if compute.accelerator_type else f", {kind} assumed, since compute.accelerator_type is null"
    return Device(kind, _REACHED * peak, f"{100 * _REACHED:g} % of {peak:g} TFLOP/s, its dense bf16 peak{assumed}")
