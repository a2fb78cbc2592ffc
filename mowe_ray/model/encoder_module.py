"""Any torch module as an encoder, with a configuration of its own instead of a transformers class.

class CrepeConfig(EncoderConfig):
    model_type = "crepe"
    capacity: Literal["tiny", "full"] = "full"

@ENCODERS.register("crepe")
class CrepeEncoder(ModuleEncoder):
    config_class = CrepeConfig
    frame_layers = [(1024, 160, 512)]
    ...

`mowe_ray.testing.check_encoder(CrepeEncoder)` says whether it keeps to what training and exports need.
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from .encoder_base import AudioEncoder
from .frontends import FrontEnd, RawWave


class EncoderConfig(PretrainedConfig):
    """Configuration of a `ModuleEncoder`: subclasses set `model_type` and annotate their fields with defaults."""

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        """Check values against the annotations, and let transformers read the configuration."""
        super().__init_subclass__(*args, **kwargs)
        strict(cls)
        AutoConfig.register(cls.model_type, cls, exist_ok=True)

    @classmethod
    def keys(cls) -> set[str]:
        """Names that an inline configuration may give."""
        return set(cls.__dataclass_fields__) - set(PretrainedConfig.__dataclass_fields__)


class ModuleEncoder(AudioEncoder):
    """An encoder around any torch module.

    Subclasses name their `config_class` (or a `model_type` alone, if there is nothing to choose) and `frame_layers`,
    build the module, run it in `encode`, and give its `width` if the configuration has no `hidden_size`. What `encode`
    computes with is a parameter, a persistent buffer, or made in it: an export holds nothing else.

    Attributes:
        sample_rate: What the module expects, in Hz; waves are resampled to it.
        num_layers: L. With 0, `encode` may ignore `all_layers`: there is one hidden state, the output.
    """

    config_class: ClassVar[type[EncoderConfig]]
    model_type: ClassVar[str]
    num_layers = 0
    lora_targets: ClassVar[tuple[str, ...]] = ()
    model: nn.Module  # type: ignore[assignment]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a configuration without fields for a class that has only a `model_type`."""
        super().__init_subclass__(**kwargs)
        if "model_type" in vars(cls):
            cls.config_class = type(f"{cls.__name__}Config", (EncoderConfig,), {"model_type": cls.model_type})

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.front_end = front_end
        self.model = self.build(config) if model is None else model

    @classmethod
    @abstractmethod
    def build(cls, config: Any) -> nn.Module:
        """Make the module, without its weights: exports are loaded into it."""

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """Return the wave as it is, at the module's sample rate."""
        return RawWave(cls.sample_rate)

    @classmethod
    def check_config(cls, values: Mapping[str, Any]) -> None:
        """Raise ValueError if an inline configuration has an unknown key, or a value of a wrong type."""
        keys = cls.config_class.keys()
        for key in values.keys() - keys - {"model_type"}:
            near = difflib.get_close_matches(key, keys, 1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(keys)) or 'none'}"
            raise ValueError(f"config.{key}: unknown key ({known})")
        try:
            cls.config_class(**{key: value for key, value in values.items() if key != "model_type"})
        except Exception as error:  # huggingface_hub's has no base class but this
            raise ValueError(f"config: {' '.join(str(error).split())}") from error

    def forward(
        self, features: Tensor, all_layers: bool = False, lengths: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """See `AudioEncoder.forward`."""
        states = super().forward(features, all_layers, lengths)
        return (states,) if all_layers and isinstance(states, Tensor) else states

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self._recomputes = True
