"""Export a short copy of a model before it is trained, and compare what comes back."""

from __future__ import annotations

import copy
import re
import tempfile
from dataclasses import replace

import torch
from torch import nn
from transformers import PretrainedConfig

from .configuration_mowe import MoweConfig
from .encoders import quiet_transformers
from .export import export
from .modeling_mowe import MoweForConditionalGeneration
from .processing_mowe import MoweProcessor

_SMALL = 50_000_000
"""Parameters up to which a model is tried with all its layers."""
_LARGEST = 1_500_000_000
"""Parameters of a copy that is tried: in float32, and once more when it is read, 12 GB."""
_TOLERANCE = 1e-3


def try_export(model: MoweForConditionalGeneration, processor: MoweProcessor, *, merge: bool) -> str | None:
    """Write, read and run a copy of `model` with random weights: what fails would fail after the training too.

    The copy has the model's own configuration, adapters, generation settings and processor; of a large model it has the
    first layer of each part alone. Draws no numbers of the surrounding generators.

    Args:
        model: Its parameters may be shards, or on the meta device: they are not read.
        processor: Makes its inputs, and is exported too.
        merge: As for `export`.

    Returns:
        Why no copy could be made; None if its export is right.

    Raises:
        ValueError: The export computes something else than the model, or cannot be written or read.
    """
    config = copy.deepcopy(model.config)
    if sum(_size(parameter) for parameter in model.parameters()) > _SMALL:
        config = _shortened(config)
    try:
        with torch.device("meta"):
            size = sum(_size(parameter) for parameter in MoweForConditionalGeneration(config).parameters())
        if size > _LARGEST:
            return f"one layer of each part has {size / 1e9:.1f} billion parameters"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            small = MoweForConditionalGeneration(config).eval()
            _fill_adapters(small)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Adapters of later layers alone, or layers that need others.
        return f"the model has no copy of one layer: {error}"
    small.generation_config = model.generation_config
    try:
        with quiet_transformers():
            difference = _difference(small, processor, merge)
    except Exception as error:  # whatever fails here would fail when the run is over
        raise ValueError(f"this model could not be exported after training: {error}") from error
    if not difference <= _TOLERANCE:  # it may be NaN
        raise ValueError(
            f"an export of this model would compute other logits than the model itself, by {difference:.0%}: try "
            "model.lora.merge=false, other model.lora.target_modules, or another model.language_model"
        )
    return None


@torch.no_grad()
def _difference(model: MoweForConditionalGeneration, processor: MoweProcessor, merge: bool) -> float:
    """Return the relative difference between the logits of a model and of its export."""
    samples = max(encoder.min_samples for encoder in model.audio_tower.encoders())
    wave = (torch.arange(samples) / 9).sin().mul(0.3).numpy()
    question, answer = ["What is it?"], ["A tone."]
    with tempfile.TemporaryDirectory(prefix="mowe_ray_export_check_") as folder:
        export(model, processor, folder, merge=merge)
        loaded = MoweForConditionalGeneration.from_pretrained(folder).eval()
        inputs = MoweProcessor.from_pretrained(folder)(question, [[wave]], answer)
    expected = model(**processor(question, [[wave]], answer)).logits
    loaded.generate(**processor(question, [[wave]]), max_new_tokens=1)
    return float((loaded(**inputs).logits - expected).norm() / expected.norm())


def _shortened(config: MoweConfig) -> MoweConfig:
    """Return the configuration of a model whose parts have one layer each."""
    base, weak = config.base_encoder, config.weak_encoders or []
    assert base is not None
    assert not isinstance(base, dict)
    assert isinstance(config.text_config, PretrainedConfig)
    config.base_encoder = replace(base, config=_one_layer(base.config), features=_of_one_layer(base.features))
    config.weak_encoders = [
        replace(
            spec,
            config=_one_layer(spec.config),
            features=_of_one_layer(spec.features),
        )
        for spec in weak
    ]
    config.text_config = _one_layer(config.text_config)
    return config


def _one_layer(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None:  # a module of its own, which stays as it is
        return config
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == layers:
            setattr(config, key, value[:1])
    config.num_hidden_layers = 1
    return config


def _of_one_layer(features: str) -> str:
    """Return a choice of features like this one, of an encoder with one layer."""
    return re.sub(r"^layers:.*", "weighted_sum", re.sub(r"^layer:[1-9]\d*", "layer:1", features))


def _fill_adapters(model: nn.Module) -> None:
    """Give adapters an effect: they begin as zeros."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.05)


def _size(parameter: nn.Parameter) -> int:
    # A parameter that was loaded as a shard (ZeRO-3) is empty.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
