"""`MoweConfig`: everything needed to rebuild a MoWE AudioLLM, as transformers saves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .frontends import FrontEnd, front_end_from_dict
from .fusion import FUSIONS
from .routing import GRANULARITIES, ROUTER_INPUTS, ROUTERS

# `transformers serve` and `pipeline("any-to-any")` look here what a model takes, even one that brings its own code.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("mowe", "MoweForConditionalGeneration")

TRAIN_MODES = ("frozen", "full", "lora")


@dataclass(frozen=True)
class EncoderSpec:
    """One audio encoder of the model.

    Attributes:
        name: Its name in reports.
        config: The transformers configuration of the encoder.
        front_end: The features it takes.
        train: `frozen`, `full` or `lora`.
        features: `last`, `layer:N` (0 is the input of the first layer), `layers:[N, M]` or `weighted_sum`.
    """

    name: str
    config: PretrainedConfig
    front_end: FrontEnd
    train: str = "frozen"
    features: str = "last"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `from_dict`."""
        return {
            "name": self.name,
            "config": self.config.to_dict(),
            "front_end": self.front_end.to_dict(),
            "train": self.train,
            "features": self.features,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderSpec:
        """Rebuild what `to_dict` wrote."""
        config = values["config"]
        if config["model_type"] not in CONFIG_MAPPING:
            raise ValueError(
                f"the encoder {values['name']} is of the family {config['model_type']!r}, which is unknown here; "
                "name the plugin that adds it (plugins: [FILE.py]), or import it first"
            )
        return cls(
            values["name"],
            CONFIG_MAPPING[config["model_type"]].from_dict(config),
            front_end_from_dict(values["front_end"]),
            values["train"],
            values["features"],
        )


class MoweConfig(PretrainedConfig):
    """Configuration of `MoweForConditionalGeneration`.

    Attributes:
        base_encoder: The strong encoder; an `EncoderSpec`, or its dict.
        weak_encoders: The pool, M `EncoderSpec`s or dicts; may be empty.
        text_config: Configuration of the language model.
        fusion: How the pool joins the base: a name in `FUSIONS`.
        latents: Audio tokens that a chosen member gives, for the fusion `latents`.
        router_data_independent, router_data_dependent: Which routers there are; dense fusions take none.
        router_kind: The data-dependent router: a name in `ROUTERS`.
        router_input: What it reads: `audio`, `prompt` or `audio+prompt`.
        router_hidden: Units of its hidden layer; 0 for none.
        router_granularity: Whether it decides for each `clip` or each `frame`.
        router_top_k: Members each router keeps, 1 to M.
        router_temperature: Divides the routers' logits.
        router_noise: Standard deviation of the Gaussian noise on the scaled logits in training.
        router_execution: `sparse` runs chosen members on the clips that chose them; `dense` all on
            all.
        adapter: A name in `ADAPTERS`.
        downsample: Encoder frames per audio token.
        audio_token_id: Token whose embeddings the audio replaces.
        pad_audio: `bucket` (the batch's own length) or `full30` (30 s), for encoders with such a
            choice.
        spec_augment: `{mask_prob, mask_length}` for the base encoder's mel in training, or None.
        mowe_loss, mowe_loss_weight, mowe_z_weight: Kind and weight of L_MoWE, and of the z term in
            it.
        mowe_loss_parts: Factor on each part of L_MoWE by name; 1 for parts that are not named.
        lora: LoRA adapters in the weights, by module path: `{r, alpha, dropout, target_modules}`
            each. Empty once merged.
    """

    model_type: ClassVar[str] = "mowe"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(AutoConfig, model_type="llama", optional=True)
    }

    base_encoder: EncoderSpec | dict[str, Any] | None = None
    weak_encoders: list[Any] | None = None
    text_config: PretrainedConfig | dict[str, Any] | None = None
    fusion: str = "routed"
    latents: int = 4
    router_data_independent: bool = True
    router_data_dependent: bool = True
    router_kind: str = "mlp"
    router_input: str = "audio"
    router_hidden: int = 0
    router_granularity: str = "clip"
    router_top_k: int = 1
    router_temperature: float = 1.0
    router_noise: float = 0.0
    router_execution: str = "sparse"
    adapter: str = "seqcnn"
    downsample: int = 8
    audio_token_id: int = 0
    pad_audio: str = "bucket"
    spec_augment: dict[str, Any] | None = None
    mowe_loss: str = "entropy_diversity"
    mowe_loss_weight: float = 0.1
    mowe_z_weight: float = 0.0
    mowe_loss_parts: dict[str, float] | None = None
    lora: dict[str, dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Rebuild encoder specs from a config file's dicts, and check that the values fit."""
        if isinstance(self.base_encoder, dict):
            self.base_encoder = EncoderSpec.from_dict(self.base_encoder)
        self.weak_encoders = [
            EncoderSpec.from_dict(spec) if isinstance(spec, dict) else spec for spec in self.weak_encoders or []
        ]
        self.lora = dict(self.lora or {})
        super().__post_init__(**kwargs)
        self._check()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; transformers itself would leave configs inside a list as objects."""
        values: dict[str, Any] = super().to_dict()
        if isinstance(self.base_encoder, EncoderSpec):
            values["base_encoder"] = self.base_encoder.to_dict()
        values["weak_encoders"] = [spec.to_dict() for spec in self.weak_encoders or []]
        return values

    @property
    def routed(self) -> bool:
        """Whether there are members to route to, and a router."""
        return self.num_routers > 0

    @property
    def num_routers(self) -> int:
        """Routers that there are."""
        if not self.weak_encoders or not FUSIONS.find(self.fusion).routed:
            return 0
        return int(self.router_data_independent) + int(self.router_data_dependent)

    @property
    def reads_prompt(self) -> bool:
        """Whether the data-dependent router reads instructions."""
        return self.routed and self.router_data_dependent and "prompt" in self.router_input

    @property
    def routes_frames(self) -> bool:
        """Whether the data-dependent router decides for each frame."""
        return self.routed and self.router_data_dependent and self.router_granularity == "frame"

    def _check(self) -> None:
        members = len(self.weak_encoders or [])
        if FUSIONS.find(self.fusion).routed and members:
            self._check_routers(members)
        if self.latents < 1:
            raise ValueError(f"model.latents must be at least 1, not {self.latents}")
        names = [spec.name for spec in self.weak_encoders or []]
        if len(set(names)) != members:
            raise ValueError(f"model.weak_encoders: names must differ, got {', '.join(names)}")
        for spec in self.weak_encoders or []:
            if spec.train not in TRAIN_MODES:
                raise ValueError(f"model: train must be one of {', '.join(TRAIN_MODES)}, not {spec.train!r}")

    def _check_routers(self, members: int) -> None:
        ROUTERS.find(self.router_kind)
        if not (self.router_data_independent or self.router_data_dependent):
            raise ValueError(
                "model.router: both routers are off, so no weak encoder would ever run; "
                "turn one on, or set model.weak_encoders=[] for the baseline without a pool"
            )
        if not 1 <= self.router_top_k <= members:
            raise ValueError(f"model.router.top_k must be 1 to {members}, the pool's size, not {self.router_top_k}")
        if self.router_temperature <= 0:
            raise ValueError(f"model.router.temperature must be positive, not {self.router_temperature}")
        if self.router_input not in ROUTER_INPUTS:
            raise ValueError(f"model.router.input must be one of {', '.join(ROUTER_INPUTS)}, not {self.router_input!r}")
        if self.router_granularity not in GRANULARITIES:
            raise ValueError(
                f"model.router.granularity must be one of {', '.join(GRANULARITIES)}, not {self.router_granularity!r}"
            )
        if self.routes_frames and self.router_input == "prompt":
            raise ValueError(
                "model.router.granularity: by the prompt alone, all frames of a clip are routed alike; "
                "set model.router.input=audio+prompt, or granularity=clip"
            )
