"""From a configuration to a model under DeepSpeed: the same for a run and for --find-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from mowe_ray.config import RunConfig
from mowe_ray.distributed.engine import DeepSpeedEngine, deepspeed_config
from mowe_ray.distributed.sharded_loading import sharded_loading
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.building import equal_members, strong_members
from mowe_ray.training.assemble import assemble, model_dtype, optimizer_groups
from mowe_ray.training.watchdog import Whereabouts


def build_engine(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    whereabouts: Whereabouts,
    say: Callable[[str], object],
) -> tuple[MoweProcessor, DeepSpeedEngine]:
    """Build the model with its weights and shard it; a process group must exist. Collective.

    Args:
        whereabouts: Will name the part of the model whose forward runs.
        say: Shows a line to the person who waits.

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
        say(f"warning: {warning}")
    whereabouts.follow(_parts(model, [member.name for member in config.model.weak_encoders]))
    return processor, DeepSpeedEngine(model, optimizer_groups(model, config.training), settings, whereabouts)


def _parts(model: MoweForConditionalGeneration, members: list[str]) -> dict[str, torch.nn.Module]:
    """Return the parts of the model a person knows, by name."""
    tower = model.audio_tower
    weak = dict(zip((f"weak encoder {name!r}" for name in members), tower.pool or (), strict=True))
    return {
        "base encoder": tower.base_encoder,
        **weak,
        "adapter": tower.adapter,
        "language model": model.language_model,
    }
