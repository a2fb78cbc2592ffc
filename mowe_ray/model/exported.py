"""Load an exported model, its language model in a way the caller chooses."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_mowe import MoweConfig
from .lora import merge_lora
from .modeling_mowe import MoweForConditionalGeneration
from .tower import AudioTower


def load_exported(
    folder: str, config: MoweConfig, dtype: torch.dtype, loading: AbstractContextManager[None] | None
) -> MoweForConditionalGeneration:
    """Load the weights of a `save_pretrained` folder or hub id.

    Args:
        folder: Where they are.
        config: The folder's configuration.
        dtype: Type of all weights.
        loading: Entered while the language model loads, alone. A folder with unmerged adapters loads as a whole,
            outside of it: they are not in a plain language model.
    """
    if loading is None or config.lora:
        whole: MoweForConditionalGeneration = MoweForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype
        )
        return whole
    tower = _TowerAlone.from_pretrained(folder, config=copy.deepcopy(config), dtype=dtype).audio_tower
    with loading:
        language_model = AutoModelForCausalLM.from_pretrained(
            folder,
            # A copy: building the outer model resets the attention implementation of the inner.
            config=copy.deepcopy(config.text_config),
            dtype=dtype,
            key_mapping={r"^language_model\.": ""},
            trust_remote_code=False,
        )
    base, *weak = tower.encoders()
    with torch.random.fork_rng():
        model = MoweForConditionalGeneration(config, base, weak, language_model)
    model.audio_tower = tower
    model.generation_config = language_model.generation_config
    model.eval()
    return model


def open_exported(folder: str) -> MoweForConditionalGeneration:
    """Return the model of an export without its weights, on the meta device, once it is sure that they are there.

    Raises:
        ValueError: It is no export, or weights of a part are missing; transformers would make them up.
    """
    try:
        config = MoweConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read an export from {folder!r}: {error}") from error
    with torch.device("meta"):
        model = MoweForConditionalGeneration(config)
    files = sorted(Path(folder).glob("*.safetensors"))
    stored = {name for file in files for name in safe_open(file, "pt").keys()}  # noqa: SIM118 - it is no dict
    missing = model.state_dict().keys() - stored - model.all_tied_weights_keys.keys()
    if missing:
        names = [spec.name for spec in config.weak_encoders or []]
        parts = {_part(name, names) for name in missing}
        raise ValueError(
            f"{folder} lacks {len(missing)} weights, of {', '.join(sorted(parts))} (such as {min(missing)}): "
            "export the model again, or copy the missing files"
        )
    return model


def _part(weight: str, members: list[str]) -> str:
    """Name the part of the model a weight belongs to."""
    path = weight.split(".")
    if path[:3] == ["audio_tower", "pool", "members"]:
        return f"the weak encoder {members[int(path[3])]}"
    return path[1] if path[0] == "audio_tower" else path[0]


def load_tower(folder: str, dtype: torch.dtype) -> AudioTower:
    """Load the audio side of a `save_pretrained` folder or hub id, as `load_model` gives it to the model."""
    config = MoweConfig.from_pretrained(folder)
    if config.lora:
        whole = load_exported(folder, config, dtype, None)
        merge_lora(whole)
        return whole.audio_tower
    tower: AudioTower = _TowerAlone.from_pretrained(folder, config=config, dtype=dtype).audio_tower
    return tower


class _TowerAlone(PreTrainedModel):
    """The part of a MoWE checkpoint that is not the language model."""

    config_class = MoweConfig
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected = [r"^language_model\."]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MoweConfig):
        super().__init__(config)
        self.audio_tower = AudioTower(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        MoweForConditionalGeneration._init_weights(self, module)  # type: ignore[arg-type]
