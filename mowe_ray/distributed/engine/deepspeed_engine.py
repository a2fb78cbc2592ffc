"""The model of a run under DeepSpeed: ZeRO sharding, mixed precision, gradient clipping, checkpoints.

`build_engine` loads the model, sharded from the start under ZeRO-3, and wraps it in the `DeepSpeedEngine` that the
training loop calls.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from mowe_ray.config import RunConfig
from mowe_ray.distributed.engine import deepspeed, zero_state
from mowe_ray.distributed.engine.gradients import GradientOrder, GradientSums
from mowe_ray.model import MoweForConditionalGeneration, MoweOutput, MoweProcessor
from mowe_ray.model.building import equal_members, strong_members
from mowe_ray.training.build import assemble, model_dtype, optimizer_groups
from mowe_ray.training.checkpoint.reader import Checkpoint, TensorSlice
from mowe_ray.training.fault_tolerance.watchdog import ActivityTracker
from mowe_ray.training.optimizer import set_learning_rates

# An all-reduce for inference on CPUs, which training never calls: DeepSpeed would compile it for half a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_LARGEST_BUCKET = 500_000_000
"""Gradient elements that DeepSpeed reduces at once, by its own default; from ZeRO-1 on it allocates all of them."""


def build_engine(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    activity: ActivityTracker,
    log: Callable[[str], object],
) -> tuple[MoweProcessor, DeepSpeedEngine]:
    """Builds the model with its weights and shards it; a process group must exist. Collective.

    Args:
        activity: Records which part of the model runs.
        log: Called with each warning.

    Raises:
        ValueError: A checkpoint cannot be used; the message names the key.
    """
    gpu = config.compute.gpus_per_worker > 0
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
    for warning in [*equal_members(model), *strong_members(model)]:
        log(f"warning: {warning}")
    activity.track_modules(_parts(model, [member.name for member in config.model.weak_encoders]))
    return processor, DeepSpeedEngine(model, optimizer_groups(model, config.training), settings, activity)


def _parts(model: MoweForConditionalGeneration, members: list[str]) -> dict[str, torch.nn.Module]:
    """Returns the parts of the model that the watchdog names, by name."""
    tower = model.audio_tower
    weak = dict(zip((f"weak encoder {name!r}" for name in members), tower.pool or (), strict=True))
    return {
        "base encoder": tower.base_encoder,
        **weak,
        "adapter": tower.adapter,
        "language model": model.language_model,
    }


def deepspeed_config(
    *,
    zero_stage: int,
    clip_norm: float,
    bf16: bool,
    offload: Literal["none", "cpu"],
) -> dict[str, Any]:
    """Returns the DeepSpeed configuration of a run.

    Args:
        clip_norm: Limit of the global gradient norm; 0 turns clipping off (DeepSpeed's own default is 1.0).
    """
    zero: dict[str, Any] = {"stage": zero_stage}
    if offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
        if zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        # Only DeepSpeed's own counters read these two: our batches vary in size, and the loop says when a step ends.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": bf16},
        # Below ZeRO-2 DeepSpeed refuses, or takes another optimizer: see `GradientSums`.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and zero_stage >= 2 else {}),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW also runs on offloaded states, and needs no compiler on the machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def sharded_loading(config: dict[str, Any]) -> AbstractContextManager[None] | None:
    """Returns a context in which transformers' `from_pretrained` shards weights over the ranks; None below ZeRO-3.

    Rank 0 alone reads the checkpoint, and hands out one tensor after the other: every rank must load the same. Nothing
    else belongs inside: random weights would be drawn by rank 0 alone, and unused weights are not reported.

    Args:
        config: DeepSpeed's configuration, which the engine gets too.
    """
    return _sharded(config) if config["zero_optimization"]["stage"] == 3 else None


@contextmanager
def _sharded(config: dict[str, Any]) -> Iterator[None]:
    kept_alive = HfDeepSpeedConfig(config)  # transformers has only a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept_alive


class DeepSpeedEngine:
    """A model and its AdamW under DeepSpeed, with the interface of the training loop.

    Responsibilities:
    - scale losses so that gradients are sums over ranks and micro-batches (the model's losses are
      already parts of the global loss);
    - sum gradients over ranks in one order, and over micro-batches in float32;
    - enter idle encoders also outside training under ZeRO-3, where every rank must gather the same weights;
    - name the trainable tensors that a step left without gradient;
    - record its current activity, for the watchdog.

    Attributes:
        updates: Calls of `step` so far; it grows before a weight changes.
    """

    def __init__(
        self,
        model: MoweForConditionalGeneration,
        groups: list[dict[str, Any]],
        config: dict[str, Any],
        activity: ActivityTracker | None = None,
    ):
        """Shard `model` and create its optimizer; a process group must exist. Collective."""
        self._activity = activity or ActivityTracker()
        self.updates = 0
        deepspeed.utils.logger.setLevel(logging.ERROR)
        self._stage: int = config["zero_optimization"]["stage"]
        model.enter_idle_encoders = self._stage == 3
        self._touched: set[str] = set()
        self._trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self._watch_gradients(model)
        summed_here = config["bf16"]["enabled"] and self._stage < 2
        self._sums = GradientSums(p for p in model.parameters() if p.requires_grad and summed_here)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # so that a slice of it can be named by start and length
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for group in groups for p in group["params"]],
            optimizer=optimizer,
            config=_with_fitting_bucket(config, model),
        )
        # DeepSpeed moves nothing of a model that came as shards (see `sharded_loading`).
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)
        if self._stage >= 2:
            GradientOrder(self._engine.optimizer, (p for p in model.parameters() if p.requires_grad))
        zero_state.forget_first_update(self._engine)
        self.rank: int = dist.get_rank()

    @property
    def model(self) -> MoweForConditionalGeneration:
        """The wrapped model; under ZeRO-3 its parameters are shards."""
        module: MoweForConditionalGeneration = self._engine.module
        return module

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return torch.device(self._engine.device)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size()

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded, so that all ranks must run the same modules at the same time."""
        return self._stage == 3

    def forward(self, **inputs: Any) -> MoweOutput:
        """Runs the model on this rank's inputs."""
        with self._activity.during("forward"):
            output: MoweOutput = self._engine(**inputs)
        return output

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulates the gradient of a micro-batch's part of the global loss; reduces it after the `last`.

        DeepSpeed averages over ranks: the factor undoes it. Accumulation is not averaged at all.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._sums.last = last
        with self._activity.during("backward"):
            self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate_factor: float) -> float:
        """Clips the gradients, updates the weights and clears the gradients; returns their global norm before clipping.

        A norm that is not finite skips the update: all ranks keep weights and moments as they were and return inf.
        """
        set_learning_rates(self._engine.optimizer.param_groups, learning_rate_factor)
        # ZeRO computes the norm itself, over all shards; without ZeRO it is read here, which makes the host wait once a
        # step.
        norm = float(self._local_norm()) if self._stage == 0 else None
        if norm is not None and not math.isfinite(norm):  # ZeRO skips by itself, torch's optimizer would not
            self.updates += 1
            self._engine.zero_grad()
            return math.inf
        # Counted before DeepSpeed begins: an emergency checkpoint must never hold weights that are half updated.
        with self._activity.during("optimizer step"):
            self.updates += 1
            self._engine.step()
        if not self._engine.was_step_applied():
            return math.inf
        return float((self._engine.get_global_grad_norm() or 0.0) if norm is None else norm)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sums `values` over all ranks, on this rank's device."""
        values = values.to(self.device)
        with self._activity.during("all-reduce of the ranks' sums"):
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's `value`, by rank."""
        # Objects travel as pickles, which is safe among processes of one run.
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def untouched_parameters(self) -> list[str]:
        """Returns the trainable parameters that no backward of this rank has reached yet."""
        return [name for name in self._trainable if name not in self._touched]

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, including those before a restart."""
        return zero_state.optimizer_steps(self._engine)

    def snapshot(self) -> dict[str, TensorSlice]:
        """Returns a copy, on the CPU, of this rank's part of weights, moments and buffers; not collective.

        Frozen weights are left out: they come from the base checkpoints again.
        """
        return zero_state.snapshot(self._engine)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores the state from `checkpoint`, whatever world size and ZeRO stage wrote it. Collective."""
        zero_state.restore(self._engine, checkpoint)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Returns all weights, complete and on the CPU, on rank 0 (elsewhere an empty dict). Collective."""
        # By every name: tied weights have several in a state dict, whose own tensors are empty shards under ZeRO-3.
        tensors = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        weights: dict[str, torch.Tensor] = {}
        for name in self.model.state_dict():
            tensor = tensors[name]
            # One at a time, so that no accelerator ever holds all weights. ZeRO-3 gives a `ds_id` to what it has
            # partitioned.
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if self.rank == 0:
                    weights[name] = tensor.detach().cpu().clone()
        return weights

    def _watch_gradients(self, model: nn.Module) -> None:
        # Hooks see the gradient before ZeRO partitions and frees it.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda _grad, name=name: self._touched.add(name))

    def _local_norm(self) -> torch.Tensor:
        # Without ZeRO, DeepSpeed keeps no norm; the gradients are reduced already and equal on all ranks.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


def _with_fitting_bucket(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns `config` with a bucket no larger than the model's gradients, unless it names a size."""
    # Under ZeRO-3 a tensor that was loaded in shards is empty, and knows its size as `ds_numel`.
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    bucket = {"reduce_bucket_size": min(elements, _LARGEST_BUCKET)}
    return config | {"zero_optimization": bucket | config["zero_optimization"]}
