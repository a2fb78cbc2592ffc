"""Write a trained model as a folder that plain transformers loads."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_mowe import MoweConfig
from .modeling_mowe import MoweForConditionalGeneration
from .processing_mowe import MoweProcessor

_AUTO_CLASSES = {
    "AutoConfig": "configuration_mowe.MoweConfig",
    "AutoModel": "modeling_mowe.MoweForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_mowe.MoweForConditionalGeneration",
    "AutoProcessor": "processing_mowe.MoweProcessor",
}


def export(
    model: MoweForConditionalGeneration,
    processor: MoweProcessor,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `model` with its LoRA adapters merged, and `processor`, as safetensors and their code.

    Where `mowe_ray.model` is imported, `AutoModel.from_pretrained(folder)` uses it; elsewhere
    `trust_remote_code=True` runs the copy of its code in the folder, with nothing but torch and
    transformers. That is the reader's own consent: nothing of ours passes it.

    Args:
        model: What to write; stays as it is.
        processor: Makes its inputs.
        folder: Where to write.
        state_dict: All weights, where the model itself holds only shards of them.
    """
    folder = Path(folder)
    config: MoweConfig = copy.deepcopy(model.config)
    config.auto_map = dict(_AUTO_CLASSES)
    weights = merged_state(config, state_dict or model.state_dict())
    config.lora = {}
    with torch.device("meta"):
        plain = MoweForConditionalGeneration(config)
    missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    # Gathered weights may come with buffers that are computed, not saved.
    assert set(unexpected) <= {name for name, _ in plain.named_buffers()}, unexpected
    # Tied weights may be listed under one of their names.
    assert set(missing) <= plain.all_tied_weights_keys.keys(), missing
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    processor = copy.copy(processor)
    setattr(processor, "auto_map", dict(_AUTO_CLASSES))  # noqa: B010
    processor.save_pretrained(folder)
    _copy_code(folder)


def merged_state(config: MoweConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without adapters: W + (alpha / r) B A where there was one, in W's dtype.

    Args:
        config: Tells the scales, by the adapted modules' paths.
        state: Weights under the names that LoRA gives them.
    """
    merged = {}
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        plain_name = name.replace(".base_layer.", ".")
        prefix = name.removesuffix(".base_layer.weight")
        if f"{prefix}.lora_A.default.weight" in state and prefix != name:
            scale = next(
                lora["alpha"] / lora["r"] for path, lora in (config.lora or {}).items() if name.startswith(path + ".")
            )
            down, up = (state[f"{prefix}.lora_{factor}.default.weight"].float() for factor in "AB")
            weight = (weight.float() + up @ down * scale).to(weight.dtype)
        merged[plain_name] = weight
    return merged


def _copy_code(folder: Path) -> None:
    for module in {reference.split(".")[0] for reference in _AUTO_CLASSES.values()}:
        file = sys.modules[f"{__package__}.{module}"].__file__
        assert file is not None
        for needed in (file, *get_relative_import_files(file)):
            shutil.copyfile(needed, folder / Path(needed).name)
