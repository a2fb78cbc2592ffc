from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, HubertConfig, LlamaConfig, WhisperConfig

from mowe_ray.model import MoweConfig
from mowe_ray.model.configuration_mowe import EncoderSpec
from mowe_ray.model.frontends import LogMel, NormalisedWave


def make_config(**changes: Any) -> MoweConfig:
    base = EncoderSpec("base", WhisperConfig(d_model=16), LogMel(80))
    weak = [
        EncoderSpec("a", HubertConfig(hidden_size=24), NormalisedWave(False), "lora", "layer:3"),
        EncoderSpec("b", WhisperConfig(d_model=8, num_mel_bins=128), LogMel(128), "full"),
    ]
    values: dict[str, Any] = {
        "base_encoder": base,
        "weak_encoders": weak,
        "text_config": LlamaConfig(hidden_size=32),
        "lora": {"language_model": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]}},
        "spec_augment": {"mask_prob": 0.05, "mask_length": 20},
    }
    return MoweConfig(**values | changes)


def test_a_list_of_encoder_configs_survives_saving(tmp_path: Path) -> None:
    config = make_config(router_top_k=2, router_temperature=0.5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoweConfig)
    assert [type(spec.config) for spec in loaded.weak_encoders or []] == [HubertConfig, WhisperConfig]
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert (loaded.router_top_k, loaded.router_temperature) == (2, 0.5)
    assert loaded.get_text_config().hidden_size == 32


def test_saving_twice_gives_the_same_file(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path / "one")
    MoweConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "config.json").read_text() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"router_top_k": 3}, "model.router.top_k"),
        ({"router_top_k": 0}, "model.router.top_k"),
        ({"router_temperature": 0.0}, "model.router.temperature"),
        ({"fusion": "subtract"}, "model.fusion"),
        ({"router_kind": "tree"}, "model.router.kind"),
        ({"router_input": "video"}, "model.router.input"),
        ({"router_granularity": "word"}, "model.router.granularity"),
        ({"router_granularity": "frame", "router_input": "prompt"}, "model.router.granularity"),
        ({"latents": 0}, "model.latents"),
        ({"router_data_independent": False, "router_data_dependent": False}, "model.router"),
    ],
)
def test_contradictions_name_the_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        make_config(**changes)


def test_members_need_different_names() -> None:
    twice = [EncoderSpec("a", HubertConfig(), NormalisedWave())] * 2
    with pytest.raises(ValueError, match="names must differ"):
        make_config(weak_encoders=twice)


def test_default_config_exists_as_transformers_expects() -> None:
    assert MoweConfig().to_dict()["weak_encoders"] == []
