"""Reads and sets the master weights and AdamW moments that DeepSpeed keeps on each rank.

ZeRO flattens parameters and partitions the flat tensors. At every stage a rank holds one contiguous slice of a
parameter, inside one fp32 tensor that AdamW updates. A snapshot names the slice of every parameter, so any number of
ranks at any stage can restore from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from mowe_ray.distributed.engine import deepspeed
from mowe_ray.training.checkpoint.reader import Checkpoint, TensorSlice

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEPS = "optimizer_steps"


@dataclass(frozen=True)
class _OwnedSlice:
    """The slice of a parameter that is on this rank.

    Attributes:
        name, shape: Name and shape of the parameter.
        start, length: The slice, in the flattened parameter.
        master: The fp32 tensor that AdamW updates; AdamW's state has its moments, of the same shape.
        offset: Where the slice begins in the flattened `master`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    master: torch.Tensor
    offset: int


def snapshot(engine: deepspeed.DeepSpeedEngine) -> dict[str, TensorSlice]:
    """Returns copies, on the CPU, of what this rank alone must keep. Not collective.

    Names are `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` for every trainable parameter (in fp32), and from
    rank 0 `buffer/NAME` for every buffer of the model's state dict, and `optimizer_steps`.
    """
    slices = {}
    for owned in _owned_slices(engine):
        start, length = _own_part(engine, owned)
        if not length:
            continue
        offset = owned.offset + start - owned.start
        for kind, tensor in _tensors(engine, owned.master).items():
            # A copy also on the CPU: training goes on while the checkpoint is written.
            data = tensor.detach().view(-1).narrow(0, offset, length).to("cpu", copy=True)
            slices[f"{kind}/{owned.name}"] = TensorSlice(data, start, owned.shape)
    if dist.get_rank() == 0:
        for name, buffer in _buffers(engine.module):
            data = buffer.detach().reshape(-1).to("cpu", copy=True)
            slices[f"buffer/{name}"] = TensorSlice(data, 0, tuple(buffer.shape))
        slices[_STEPS] = TensorSlice(torch.tensor([optimizer_steps(engine)]), 0, (1,))
    return slices


@torch.no_grad()
def restore(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Sets weights, moments, step count and buffers to those of `checkpoint`. Collective.

    Raises:
        ValueError: The checkpoint is of another model.
    """
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # gathered parameters would outlive the change
    steps = int(checkpoint.read(_STEPS, 0, 1))
    for master in _masters(engine):
        state = engine.basic_optimizer.state[master]
        # AdamW's bias correction depends on it; a new optimizer has no state before its first step.
        state["step"] = torch.tensor(float(steps))
        for moment in _MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(master)
    for owned in _owned_slices(engine):
        for kind, tensor in _tensors(engine, owned.master).items():
            target = tensor.detach().view(-1).narrow(0, owned.offset, owned.length)
            target.copy_(_read(checkpoint, f"{kind}/{owned.name}", owned))
    for name, buffer in _buffers(engine.module):
        buffer.copy_(checkpoint.read(f"buffer/{name}", 0, buffer.numel()).view(buffer.shape))
    _derive_weights(engine, stage)


@torch.no_grad()
def forget_first_update(engine: deepspeed.DeepSpeedEngine) -> None:
    """Undo the update without gradients that DeepSpeed begins with in bfloat16 without ZeRO.

    It decays the master weights, and counts as a step. Elsewhere this changes nothing.
    """
    if engine.zero_optimization_stage() == 0:
        engine.basic_optimizer.state.clear()
        for weight, master in _working_and_master(engine):
            master.copy_(weight)


def optimizer_steps(engine: deepspeed.DeepSpeedEngine) -> int:
    """Returns the updates that AdamW has made."""
    states = engine.basic_optimizer.state
    # One number is stored for all tensors; others would lose their bias correction on resuming.
    steps = {int(states[master]["step"]) if states.get(master) else 0 for master in _masters(engine)}
    assert len(steps) == 1, f"tensors were updated {steps} times: some went without gradient"
    return steps.pop()


def _read(checkpoint: Checkpoint, name: str, owned: _OwnedSlice) -> torch.Tensor:
    if checkpoint.shapes.get(name, owned.shape) != owned.shape:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step} has {name} of shape {checkpoint.shapes[name]}, "
            f"the model of shape {owned.shape}: choose another name"
        )
    return checkpoint.read(name, owned.start, owned.start + owned.length)


def _masters(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    """The fp32 tensors that AdamW updates on this rank."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage:
        return list(optimizer.single_partition_of_fp32_groups)
    return [master for group in optimizer.param_groups for master in group["params"]]


def _owned_slices(engine: deepspeed.DeepSpeedEngine) -> Iterator[_OwnedSlice]:
    """Yields this rank's slice of every trainable parameter; without ZeRO, that is all of it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 3:
        for name, p in named:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = size * dist.get_rank()
            # ZeRO-3 cuts every parameter into equal partitions, one a rank.
            length = max(0, min(size, p.ds_numel - start))  # the last partitions are padded
            yield _OwnedSlice(
                name, tuple(p.ds_shape), start, length, optimizer.fp32_partitioned_groups_flat[group], offset
            )
    elif stage:
        for name, p in named:
            if (mapping := p._hp_mapping) is not None:  # else none of it is on this rank
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                yield _OwnedSlice(name, tuple(p.shape), here.start, here.numel, master, there.start)
    else:
        masters = dict(_working_and_master(engine))
        for name, p in named:
            yield _OwnedSlice(name, tuple(p.shape), 0, p.numel(), masters[p], 0)


def _working_and_master(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yields each parameter with its fp32 master, without ZeRO: a copy in bfloat16 training, else itself."""
    working = getattr(engine.optimizer, "fp16_groups", None)
    masters = [group["params"] for group in engine.optimizer.param_groups]
    for some, others in zip(working or masters, masters, strict=True):
        yield from zip(some, others, strict=True)


def _own_part(engine: deepspeed.DeepSpeedEngine, owned: _OwnedSlice) -> tuple[int, int]:
    """Start and length of what this rank writes: its slice or, where every rank has all of it, an equal part."""
    if engine.zero_optimization_stage():
        return owned.start, owned.length
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Every rank has everything, and writes its share of it: together they write each element once.
    start = owned.length * rank // world_size
    return start, owned.length * (rank + 1) // world_size - start


def _tensors(engine: deepspeed.DeepSpeedEngine, master: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weight and its moments; AdamW makes these in its first step, and they begin as zeros."""
    state = engine.basic_optimizer.state.get(master) or dict.fromkeys(_MOMENTS, master.new_zeros(()).expand_as(master))
    return {"weight": master, **{moment: state[moment] for moment in _MOMENTS}}


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the buffers that the state dict has."""
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer


def _derive_weights(engine: deepspeed.DeepSpeedEngine, stage: int) -> None:
    """Sets the weights the model computes with from the masters, as an optimizer step ends."""
    optimizer = engine.optimizer
    if stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    else:
        for weight, master in _working_and_master(engine):
            weight.copy_(master)
