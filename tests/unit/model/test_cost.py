"""Costs against figures that were counted by hand or published."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mowe_ray.model.cost import (
    Cost,
    _all_steps_at_once,
    encoder_cost,
    encoder_on_meta,
    language_model_cost,
    language_model_on_meta,
    zero_memory_bytes,
)
from tests.tiny_models import (
    ENCODER_CONFIGS,
    LANGUAGE_MODEL_FAMILIES,
    save_encoder_checkpoint,
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_whisper_config,
)


def cost_of_30_s(source: str) -> Cost:
    encoder = encoder_on_meta(source)
    assert encoder is not None
    return encoder_cost(encoder, 30.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "parameters", "gflops"),
    [
        ("openai/whisper-large-v3", 636_968_960, 2274),
        ("openai/whisper-tiny", 8_208_384, 36.9),
        ("facebook/hubert-base-ls960", 94_370_944, 500),
        ("superb/hubert-base-superb-er", 94_370_944, 500),
    ],
)
def test_published_encoders(source: str, parameters: int, gflops: float) -> None:
    cost = cost_of_30_s(source)
    assert cost.parameters == parameters
    assert cost.gflops == pytest.approx(gflops, rel=2e-3)


@pytest.mark.slow
def test_whisper_large_adds_up_by_hand() -> None:
    """Projections, attention and convolutions, each multiply-add counted as two operations."""
    frames, width, layers = 1500, 1280, 32
    projections = layers * 2 * frames * (4 * width * width + 2 * width * 4 * width)
    attention = layers * 2 * 2 * frames * frames * width
    convolutions = 2 * (2 * frames * width * 128 * 3 + frames * width * width * 3)
    by_hand = (projections + attention + convolutions) / 1e9
    assert cost_of_30_s("openai/whisper-large-v3").gflops == pytest.approx(by_hand, rel=1e-6)


def test_published_language_model() -> None:
    model = language_model_on_meta("microsoft/Phi-3-mini-4k-instruct")
    cost = language_model_cost(model, 288)
    assert cost.parameters == 3_821_079_552
    linears = 2 * 288 * (cost.parameters - 32_064 * 3072 - (2 * 32 + 1) * 3072)
    attention = 32 * 2 * 2 * 288 * 288 * 3072
    assert cost.gflops == pytest.approx((linears + attention) / 1e9, rel=1e-6)


@pytest.mark.slow
def test_every_family_can_be_counted() -> None:
    for config in ENCODER_CONFIGS.values():
        encoder = encoder_on_meta(config())
        assert encoder is not None
        assert encoder_cost(encoder, 0.01).gflops > 0
        assert {p.device.type for p in encoder.parameters()} == {"meta"}
    for family in LANGUAGE_MODEL_FAMILIES:
        model = language_model_on_meta(tiny_language_model_config(family))
        assert language_model_cost(model, 10).gflops > 0


@pytest.mark.slow
def test_only_what_is_trained_counts_as_trainable() -> None:
    encoder = encoder_on_meta(tiny_whisper_config())
    positions = 1500 * 32
    assert encoder is not None
    assert encoder_cost(encoder, 1).trainable == encoder_cost(encoder, 1).parameters - positions
    assert encoder_cost(encoder.requires_grad_(False), 1).trainable == 0


@pytest.mark.slow
def test_a_local_checkpoint_is_read_and_a_wrong_path_is_an_error(tmp_path: Path) -> None:
    save_encoder_checkpoint(tmp_path, tiny_hubert_config())
    encoder = encoder_on_meta(str(tmp_path))
    assert encoder is not None
    assert encoder.config.hidden_size == 32
    with pytest.raises(ValueError, match="cannot read a checkpoint"):
        encoder_on_meta(str(tmp_path / "nowhere"))


def test_a_hub_id_out_of_reach_is_unknown_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert encoder_on_meta("nobody/whisper-gigantic") is None
    assert language_model_on_meta("nobody/phi-gigantic") is None


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_memory_equals_the_papers_example(stage: int, gigabytes: float) -> None:
    """Figure 1 of arXiv 1910.02054: 7.5 B weights, 64 workers, mixed precision."""
    memory = zero_memory_bytes(7_500_000_000, 0, stage, world_size=64, bytes_per_weight=2)
    assert memory["total"] / 1e9 == pytest.approx(gigabytes, abs=0.06)
    assert memory["total"] == memory["weights"] + memory["gradients"] + memory["optimizer"]


def test_float32_sums_of_gradients_cost_four_bytes_a_weight() -> None:
    for stage, workers, share in ((0, 8, 1), (1, 8, 1), (2, 8, 8), (3, 8, 8)):
        plain, summed = (zero_memory_bytes(8000, 0, stage, workers, 2, float32_sums=on) for on in (False, True))
        assert summed["gradients"] - plain["gradients"] == 4 * 8000 / share
        assert summed["total"] - plain["total"] == 4 * 8000 / share
        assert zero_memory_bytes(8, 0, stage, 1, 4, float32_sums=True) == zero_memory_bytes(8, 0, stage, 1, 4)


def test_frozen_weights_cost_their_own_bytes_only() -> None:
    for stage, share in ((0, 1), (2, 1), (3, 4)):
        memory = zero_memory_bytes(0, 1000, stage, world_size=4, bytes_per_weight=2)
        expected = 2000 // share
        assert memory == {"weights": expected, "gradients": 0, "optimizer": 0, "total": expected}


def test_zero_memory_of_a_real_optimizer() -> None:
    """Plain float32 AdamW holds weights, gradients, mean and variance: 16 bytes per weight."""
    layer = torch.nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    held = [layer.weight, layer.weight.grad, *states]
    memory = zero_memory_bytes(10_000, 0, 0, world_size=1, bytes_per_weight=4)
    assert memory["total"] == sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, partial(nn.LSTM, proj_size=3)])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 3, "batch_first": True}, {"num_layers": 2, "bidirectional": True}]
)
def test_recurrent_layers_are_counted_as_step_by_step(kind: Callable[..., nn.RNNBase], options: dict[str, Any]) -> None:
    layer = kind(5, 7, **options, device="meta")
    inputs = torch.empty(2, 11, 5, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as slow:
        wanted = layer(inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as fast:
        found = _all_steps_at_once(layer, inputs)
    assert fast.get_total_flops() == slow.get_total_flops() > 0
    assert [one.shape for one in tree_leaves(found)] == [one.shape for one in tree_leaves(wanted)]
