"""Encoders around modules that transformers does not know, and `mowe_ray.testing.check_encoder`."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from mowe_ray.config import ConfigError, load_config
from mowe_ray.config.plugins import import_plugins
from mowe_ray.model.encoders import ENCODERS, EncoderConfig, ModuleEncoder, load_encoder
from mowe_ray.model.frontends import resample
from mowe_ray.testing import check_encoder

EXAMPLES = Path(__file__).parents[3] / "examples" / "plugins"
LIBRARIES = {"crepe": "torchcrepe", "silero-vad": "silero_vad", "resemblyzer": "resemblyzer"}
FILES = {"crepe": "crepe.py", "silero-vad": "voice_activity.py", "resemblyzer": "speaker.py"}


class FilterConfig(EncoderConfig):
    model_type = "filter-of-a-test"
    hidden_size: int = 8
    kind: Literal["plain", "squared"] = "plain"


class FilterEncoder(ModuleEncoder):
    """Windows of the wave through one linear layer."""

    config_class = FilterConfig
    frame_layers = ((400, 320, 0),)

    @staticmethod
    def build(config: Any) -> nn.Module:
        return nn.Linear(400, config.hidden_size)

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor:
        return torch.as_tensor(self.model(features.unfold(1, 400, 320)))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    ENCODERS.register("filter-of-a-test")(FilterEncoder)
    yield
    ENCODERS.pop("filter-of-a-test", None)


def test_a_module_keeps_to_the_contract() -> None:
    check_encoder(FilterEncoder)
    check_encoder(FilterEncoder, {"hidden_size": 3, "kind": "squared"})


class Shorter(FilterEncoder):
    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor:
        return super().encode(features, lengths, all_layers)[:, 1:]


class OverClips(FilterEncoder):
    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor:
        frames = super().encode(features, lengths, all_layers)
        return frames - frames.mean(0, keepdim=True)


class OverPadding(FilterEncoder):
    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor:
        return super().encode(features, lengths, all_layers) * features.square().mean(1)[:, None, None]


class Idle(FilterEncoder):
    @staticmethod
    def build(config: Any) -> nn.Module:
        model = FilterEncoder.build(config)
        model.unused = nn.Parameter(torch.zeros(1))
        return model


class Forgetful(FilterEncoder):
    @staticmethod
    def build(config: Any) -> nn.Module:
        model = FilterEncoder.build(config)
        model.register_buffer("window", torch.hann_window(400), persistent=False)
        return model


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Shorter, "by `frame_layers`"),
        (OverClips, "in a batch than alone"),
        (OverPadding, "padding of"),
        (Idle, "no gradient for model.unused"),
        (Forgetful, "lost in an export: model.window"),
    ],
)
def test_what_breaks_the_contract_is_said(wrong: type[FilterEncoder], message: str) -> None:
    ENCODERS["filter-of-a-test"] = wrong
    with pytest.raises(AssertionError, match=message):
        check_encoder(wrong)


def test_a_class_that_is_not_registered_is_no_encoder() -> None:
    del ENCODERS["filter-of-a-test"]
    with pytest.raises(AssertionError, match="not registered"):
        check_encoder(FilterEncoder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("hidden_sise: 4", r"config\.hidden_sise: unknown key \(did you mean hidden_size\?\)"),
        ("kind: other", r"'kind' expected one of \('plain', 'squared'\), got other"),
        ("hidden_size: many", r"'hidden_size' expected int"),
    ],
)
def test_its_config_is_checked_like_the_rest_of_a_configuration(values: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.base_encoder: .*{message}"):
        load_config("quickstart", [f"model.base_encoder={{config: {{model_type: filter-of-a-test, {values}}}}}"])


def test_a_resampled_tone_stays_the_tone() -> None:
    """Against the sine itself, away from the ends of the clip, where a filter sees silence."""
    time = torch.arange(16_000, dtype=torch.float64) / 16_000
    for rate in (24_000, 48_000, 8_000, 44_100):
        tone = resample(torch.sin(2 * torch.pi * 440 * time)[None], rate)
        wanted = torch.sin(2 * torch.pi * 440 * torch.arange(rate, dtype=torch.float64) / rate)
        assert tone.shape == (1, rate)
        torch.testing.assert_close(tone[0, 200:-200], wanted[200:-200], atol=2e-3, rtol=0)
    assert resample(torch.zeros(2, 16_001), 48_000).shape == (2, 48_003)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow if name == "silero-vad" else pytest.mark.soak) for name in LIBRARIES],
)
def test_the_examples_keep_to_the_contract(family: str) -> None:
    if find_spec(LIBRARIES[family]) is None:
        pytest.skip(f"{LIBRARIES[family]} is not installed")
    import_plugins([str(EXAMPLES / FILES[family])])
    check_encoder(ENCODERS[family])


@pytest.mark.soak
def test_crepe_computes_what_torchcrepe_computes() -> None:
    torchcrepe = pytest.importorskip("torchcrepe")
    import_plugins([str(EXAMPLES / "crepe.py")])
    encoder = load_encoder({"model_type": "crepe"})[0].eval()
    wave = torch.sin(torch.arange(16_000) * 2 * torch.pi * 220 / 16_000)[None]
    frames = encoder(encoder.front_end(wave, torch.tensor([16_000]), 16_000))[0]
    torchcrepe.load.model("cpu", "tiny")
    theirs = torchcrepe.infer(next(torchcrepe.preprocess(wave, 16_000, 160, device="cpu")), "tiny")
    ours = torchcrepe.infer.model.classifier(frames).sigmoid()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    # 220 Hz in cents above 10 Hz, 20 cents a bin.
    assert abs(float(ours.mean(0).argmax()) * 20 + 1997.38 - 1200 * torch.tensor(22.0).log2()) < 30
