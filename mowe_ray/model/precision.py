"""Number formats of weights and buffers."""

import torch
from torch import nn


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and saved buffers of `module` in place, as `from_pretrained(..., dtype=dtype)` loads them.

    `nn.Module.to` casts the computed buffers as well, such as the `inv_freq` of rotary embeddings: in bfloat16 it gives
    positions beyond a few hundred other angles, and a model loaded from its checkpoint has it in float32 again.
    """
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
