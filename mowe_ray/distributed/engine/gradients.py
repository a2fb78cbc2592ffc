"""Gradients between the backward pass and DeepSpeed: in the same order on all ranks, summed in float32."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class GradientOrder:
    """Passes gradients to ZeRO's reduction in one order on all ranks, whatever order the backward pass makes them in.

    From ZeRO-2 on DeepSpeed fills buckets with gradients as they become ready, and sums over ranks what lies at the
    same place. A branch that depends on the data, such as a norm with or without a mask, changes that order on one rank
    alone: the gradient of one parameter would be added to that of another, silently. Here a gradient waits for those
    before it in the order, and a parameter that a backward pass leaves out gets zeros: otherwise ZeRO-2 shifts all
    that follow, and ZeRO-3 applies the previous gradient again.

    The order is the reverse of the model's, close to that of the backward pass: few gradients wait at a time.
    """

    def __init__(self, optimizer: Any, parameters: Iterable[nn.Parameter]):
        """Take the place of two methods of `optimizer`, DeepSpeed's of ZeRO-2 or 3.

        Args:
            parameters: Those that require gradients, in the model's order.
        """
        self._order = list(parameters)[::-1]
        self._next = 0
        self._waiting: set[nn.Parameter] = set()
        self._optimizer = optimizer
        # ZeRO-2 names a parameter by its group as well.
        self._partitioned = not hasattr(optimizer, "bit16_groups")
        groups = optimizer.fp16_groups if self._partitioned else optimizer.bit16_groups
        self._group = {p: () if self._partitioned else (i,) for i, group in enumerate(groups) for p in group}
        self._reduce = optimizer.reduce_ready_partitions_and_remove_grads
        self._finish = optimizer.independent_gradient_partition_epilogue
        optimizer.reduce_ready_partitions_and_remove_grads = self._add
        optimizer.independent_gradient_partition_epilogue = self._end

    def _add(self, parameter: nn.Parameter, *group: int) -> None:
        """Reduce the gradient of `parameter`, and those that waited for it, once all before it are reduced."""
        self._waiting.add(parameter)
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            ready = self._order[self._next]
            self._waiting.remove(ready)
            self._next += 1
            self._reduce(ready, *self._group[ready])

    def _end(self) -> None:
        """End a backward pass: what is missing gets zeros."""
        while self._next < len(self._order):
            missing = self._order[self._next]
            if self._partitioned:
                shape: torch.Size = missing.ds_shape  # type: ignore[attr-defined] # set by DeepSpeed
                whole = torch.zeros(shape, dtype=missing.dtype, device=missing.device)
                # torch takes a gradient of the tensor's present size alone.
                shard, missing.data = missing.data, whole
                missing.grad, missing.data = torch.zeros_like(whole), shard
                self._add(missing)
            else:
                missing.grad = torch.zeros_like(missing)
                self._optimizer.process_gradients(missing, *self._group[missing])
        self._next = 0
        self._finish()


class GradientSums:
    """Sums the gradients of half-precision parameters in float32, and rounds the sum once.

    torch adds every micro-batch to `grad` in the parameter's own type: 32 in bfloat16 are 0.6 % off. From ZeRO-2
    on DeepSpeed keeps float32 sums itself (`data_types.grad_accum_dtype`), but refuses to below. A sum takes 4 bytes a
    weight between the first backward pass of a step and the last; steps of one micro-batch take nothing.

    Attributes:
        last: Whether the next backward pass is the last of its step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        """Watch `parameters`, before anything else reads their gradients."""
        self.last = True
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in parameters:
            parameter.register_hook(lambda gradient, parameter=parameter: self._add(parameter, gradient))

    def _add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor | None:
        """Return what takes the gradient's place: the whole sum at last, zeros before."""
        if self.last:
            total = self._sums.pop(parameter, None)
            return None if total is None else total.add_(gradient).to(gradient.dtype)
        if parameter in self._sums:
            self._sums[parameter].add_(gradient)
        else:
            self._sums[parameter] = gradient.to(torch.float32, copy=True)
        return torch.zeros_like(gradient)
