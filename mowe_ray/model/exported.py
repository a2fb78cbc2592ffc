"""Load an exported model, its language model in a way the caller chooses."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
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
