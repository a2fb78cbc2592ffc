"""LoRA on parts of the model, by peft, put in place without wrapping: module names stay."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import nn
from transformers.utils import is_peft_available


def inject_lora(module: nn.Module, *, r: int, alpha: int, dropout: float, target_modules: Sequence[str] | str) -> None:
    """Add trainable low-rank adapters to linear layers of `module`, and freeze all the rest of it.

    Args:
        module: A transformers model.
        r: Rank.
        alpha: Scale: the update counts alpha / r.
        dropout: Dropout probability before the adapters.
        target_modules: Layer names, or `all-linear`.

    Raises:
        ValueError: if no layer has such a name.
    """
    peft = _peft()
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    peft.inject_adapter_in_model(config, module)


def merge_lora(module: nn.Module) -> None:
    """Add all adapters of `module` to the weights they adapt, in place, and remove them."""
    tuners_utils = _peft().tuners.tuners_utils
    for name, layer in list(module.named_modules()):
        if isinstance(layer, tuners_utils.BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())


def _peft() -> ModuleType:
    # Imported on use: a merged model loads without peft.
    if is_peft_available():
        import peft

        return peft
    raise ValueError("this model has LoRA adapters (model.lora): install peft to use it")
