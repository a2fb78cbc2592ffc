"""LoRA on parts of the model, by peft, put in place without wrapping: module names stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.utils import is_peft_available


def inject_lora(module: nn.Module, *, r: int, alpha: int, dropout: float, target_modules: Sequence[str] | str) -> None:
    """Add trainable low-rank adapters to layers of `module`, and freeze all the rest of it.

    Args:
        module: A transformers model.
        r: Rank.
        alpha: Scale: the update counts alpha / r.
        dropout: Dropout probability before the adapters.
        target_modules: Layer names, or `all-linear`.

    Raises:
        ValueError: peft cannot adapt the layers, or could not merge the adapters into them.
    """
    peft = _peft()
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    try:
        peft.inject_adapter_in_model(config, module)
    # What peft raises for names that match no layer, for layers it has no adapter for, and for settings it refuses.
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"model.lora.target_modules: peft cannot adapt {target_modules}: {error}") from error
    _refuse_shared(module)


def _refuse_shared(module: nn.Module) -> None:
    """Raise ValueError if a weight below an adapter is used elsewhere too: merged, the update would count there."""
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for name, layer in _adapted_layers(module):
        if any(uses[id(parameter)] > 1 for parameter in layer.parameters()):
            raise ValueError(
                f"model.lora.target_modules: {name} shares its weight with another layer (tied embeddings), so an "
                "update of it alone cannot be merged into the export; leave it out, or train all weights "
                "(model.lora=null)"
            )


def merge_lora(module: nn.Module) -> None:
    """Add all adapters of `module` to the weights they adapt, and remove them, by peft's own `merge`.

    The sum is taken in float32 and rounded once. Adapted weights are replaced, never written to: tensors that share
    their storage stay as they are.
    """
    for name, layer in _adapted_layers(module):
        dtypes = {key: parameter.dtype for key, parameter in layer.get_base_layer().named_parameters()}
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(torch.float32, copy=True)
        if hasattr(layer, "unload_and_optionally_merge_module"):  # nested
            merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
            merged = layer.get_base_layer()
        for key, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(dtypes[key])
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, merged)


def _adapted_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Return name and adapter of each adapted layer; the outermost one, where adapters are nested (experts)."""
    tuners_utils = _peft().tuners.tuners_utils
    adapted = [name for name, layer in module.named_modules() if isinstance(layer, tuners_utils.BaseTunerLayer)]
    inner = {name for name in adapted for outer in adapted if name.startswith(outer + ".")}
    return [(name, module.get_submodule(name)) for name in adapted if name not in inner]


def _peft() -> ModuleType:
    # Imported on use: a merged model loads without peft.
    if is_peft_available():
        import peft

        return peft
    raise ValueError("this model has LoRA adapters (model.lora): install peft to use it")
