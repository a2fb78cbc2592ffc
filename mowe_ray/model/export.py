"""Write a trained model as a folder that plain transformers loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .configuration_mowe import MoweConfig
from .encoders import stored_weights
from .export_code import AUTO_CLASSES, copy_code
from .generation_settings import greedy
from .lora import merge_lora
from .modeling_mowe import MoweForConditionalGeneration
from .processing_mowe import MoweProcessor
from .prompt_embeddings import MoweFront, MoweFrontConfig
from .tower import AudioTower

_FRONT_CLASSES = {
    "AutoConfig": "prompt_embeddings.MoweFrontConfig",
    "AutoModel": "prompt_embeddings.MoweFront",
    "AutoProcessor": "processing_mowe.MoweProcessor",
}


def export(
    model: MoweForConditionalGeneration,
    processor: MoweProcessor,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    merge: bool = True,
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
        merge: Add LoRA adapters to the weights. Otherwise they are stored as adapters, which need peft to be loaded.
    """
    folder = Path(folder)
    config: MoweConfig = copy.deepcopy(model.config)
    config.auto_map = dict(AUTO_CLASSES)
    with torch.device("meta"):
        written = MoweForConditionalGeneration(config)
    weights = {name: weight.detach().cpu() for name, weight in (state_dict or model.state_dict()).items()}
    missing, unexpected = written.load_state_dict(weights, strict=False, assign=True)
    # Gathered weights may come with buffers that are computed, not saved.
    assert set(unexpected) <= {name for name, _ in written.named_buffers()}, unexpected
    # Tied weights may be listed under one of their names.
    assert set(missing) <= written.all_tied_weights_keys.keys(), missing
    written.tie_weights()
    if merge and config.lora:
        merge_lora(written)
        written.config.lora = {}
    written.generation_config = greedy(model.generation_config, processor.chat.end_tokens())
    written.save_pretrained(folder)
    _save_processor(processor, folder, AUTO_CLASSES, config)


def export_split(model: MoweForConditionalGeneration, processor: MoweProcessor, folder: str | Path) -> None:
    """Write `folder/llm`, a plain language model with its tokenizer, and `folder/front`, which makes what it continues.

    Args:
        model: What to write; LoRA adapters are added to its weights.
        processor: Makes its inputs.
        folder: Where to write.
    """
    if model.config.lora:
        merge_lora(model)
    llm, front = Path(folder) / "llm", Path(folder) / "front"
    language_model = model.language_model
    language_model.generation_config = greedy(model.generation_config, processor.chat.end_tokens())
    language_model.save_pretrained(llm)
    processor.tokenizer.save_pretrained(llm)
    config = MoweFrontConfig.from_dict({**model.config.to_dict(), "model_type": "mowe_front", "lora": {}})
    config.auto_map = dict(_FRONT_CLASSES)
    MoweFront(config, model.audio_tower, model.get_input_embeddings()).save_pretrained(front)
    _save_processor(processor, front, _FRONT_CLASSES, config)


def _save_processor(processor: MoweProcessor, folder: Path, classes: Mapping[str, str], config: MoweConfig) -> None:
    """Write the processor, and the code of all classes."""
    processor = copy.copy(processor)
    setattr(processor, "auto_map", dict(classes))  # noqa: B010
    processor.save_pretrained(folder)
    copy_code(folder, config)


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
        model: MoweForConditionalGeneration = MoweForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype
        )
        return model
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
        ValueError: It is no export, a file is damaged, or weights of a part are missing; transformers would make them
            up.
    """
    stored = stored_weights(folder)
    try:
        config = MoweConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read an export from {folder!r}: {error}") from error
    with torch.device("meta"):
        model = MoweForConditionalGeneration(config)
    tied = model.all_tied_weights_keys.keys()
    missing = model.state_dict().keys() - stored - tied
    if missing:  # some families are written with the names of their first checkpoints
        missing = revert_weight_conversion(model, model.state_dict()).keys() - stored - tied
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
    stored_weights(folder)
    config = MoweConfig.from_pretrained(folder)
    if config.lora:
        model = load_exported(folder, config, dtype, None)
        merge_lora(model)
        return model.audio_tower
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
