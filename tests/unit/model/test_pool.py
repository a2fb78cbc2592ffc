from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mowe_ray.model.encoders import AudioEncoder, load_encoder
from mowe_ray.model.fusion import Mixture
from mowe_ray.model.pool import BaseFrames, Clips, PoolMember, WeakEncoderPool, align_frames
from mowe_ray.model.tower import AudioTower
from tests.tiny_models import tiny_ast_config, tiny_hubert_config, tiny_whisper_config
from tests.unit.model.conftest import MakeModel, waves

WIDTH, HOP = 24, 320
NO_DROPOUT = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)


def make_pool(execution: str = "sparse", seed: int = 0) -> WeakEncoderPool:
    torch.manual_seed(seed)
    configs = [tiny_whisper_config(d_model=16), tiny_hubert_config(**NO_DROPOUT), tiny_ast_config()]
    encoders = [load_encoder(config, seed + i)[0] for i, config in enumerate(configs)]
    return WeakEncoderPool([PoolMember(e, WIDTH, "last") for e in encoders], execution).double()


def make_clips(*seconds: float) -> Clips:
    arrays = waves(*seconds)
    padded = np.zeros((len(arrays), max(map(len, arrays))), np.float32)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return Clips(torch.from_numpy(padded), torch.tensor([len(array) for array in arrays]))


def choices(clips: int, *, chosen: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Weights (K, C, 3) that are zero but for the members listed per mixture and clip."""
    mask = torch.zeros(len(chosen), clips, 3, dtype=torch.bool)
    for mixture, rows in enumerate(chosen):
        for row, members in enumerate(rows):
            mask[mixture, row, members] = True
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (weights * mask).requires_grad_(), mask


def base_frames(clips: int, frames: int) -> BaseFrames:
    """Frames of a base encoder: members are only aligned with them."""
    return BaseFrames(torch.zeros(clips, frames, WIDTH), torch.full((clips,), frames), HOP)


def mixtures(weights: Tensor, mask: Tensor) -> list[Mixture]:
    return [Mixture(w[:, None], used) for w, used in zip(weights, mask, strict=True)]


CHOSEN = [[[1], [1], [1]], [[0], [1], [0]]]  # member 2 (the AST) is idle


def run(pool: nn.Module, chosen: list[list[list[int]]], **options: Any) -> tuple[list[Tensor], Tensor]:
    weights, mask = choices(3, chosen=chosen)
    clips = make_clips(0.7, 0.5, 0.6)
    mixed = pool(clips, mixtures(weights, mask), base_frames(3, 35), 35, **{"enter_idle": False} | options)
    return mixed, weights


@pytest.mark.parametrize("offset", [0.0, -0.875, 1.3])
@pytest.mark.parametrize("ratio", [1.0, 0.2, 2.5])
def test_alignment_is_linear_interpolation_over_valid_frames(ratio: float, offset: float) -> None:
    states = torch.randn(2, 12, 3, dtype=torch.float64)
    valid = [12, 5]
    aligned = align_frames(states, torch.tensor(valid), ratio, 20, offset)
    for row, count in enumerate(valid):
        for channel in range(3):
            wanted = np.interp(np.arange(20) * ratio + offset, np.arange(count), states[row, :count, channel].numpy())
            np.testing.assert_allclose(aligned[row, :, channel].numpy(), wanted, atol=1e-6)


def test_one_frame_more_or_less_is_cropped_or_repeated() -> None:
    states = torch.arange(5.0)[None, :, None]
    assert align_frames(states, torch.tensor([5]), 1.0, 4).flatten().tolist() == [0, 1, 2, 3]
    assert align_frames(states, torch.tensor([5]), 1.0, 6).flatten().tolist() == [0, 1, 2, 3, 4, 4]


def test_frames_of_another_rate_are_aligned_by_their_centres() -> None:
    """Each of the AST's frames covers 16 filter-bank frames: 0.175 s; the first has its middle at 87.5 ms."""
    member = make_pool().members[2]
    member.projection = nn.Identity()
    middles = (399 / 2 + 160 * 15 / 2 + 1600 * torch.arange(6)).double()  # samples
    frames = member(None, torch.tensor([400 + 160 * 65]), base_frames(1, 35), middles[None, None, :, None].float())
    wanted = torch.arange(35).double() * HOP  # the base's frame t has its middle at sample 320 t
    assert (frames[0, :, 0] - wanted.clamp(middles[0], middles[-1])).abs().max() < 0.01


@pytest.mark.slow
def test_hop_is_20_ms_for_speech_encoders() -> None:
    hops = [member.encoder.hop_samples for member in make_pool()]
    assert hops == [320, 320, 1600]


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen", [CHOSEN, [[[0], [1], [2]]], [[[0, 1, 2]] * 3, [[2, 0], [1, 2], [0, 1]]], [[[2]] * 3]]
)
def test_sparse_equals_dense(chosen: list[list[list[int]]]) -> None:
    results = {}
    for execution in ("sparse", "dense"):
        pool = make_pool(execution).train()
        mixed, weights = run(pool, chosen)
        torch.stack(mixed).square().sum().backward()
        grads = {name: p.grad for name, p in pool.named_parameters() if p.requires_grad}
        results[execution] = mixed, weights.grad, grads
    sparse, dense = results["sparse"], results["dense"]
    mask = choices(3, chosen=chosen)[1]
    for ours, theirs in zip(sparse[0], dense[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)
    assert sparse[1] is not None
    assert dense[1] is not None
    torch.testing.assert_close(sparse[1] * mask, dense[1] * mask, atol=1e-8, rtol=1e-8)
    assert sparse[2].keys() == dense[2].keys()
    for name, grad in sparse[2].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, dense[2][name], atol=1e-8, rtol=1e-6, msg=name)


def test_mixture_is_the_weighted_sum_of_members_run_alone() -> None:
    pool = make_pool().eval()
    mixed, weights = run(pool, CHOSEN)
    clips = make_clips(0.7, 0.5, 0.6)
    for mixture, rows in enumerate(CHOSEN):
        for row, members in enumerate(rows):
            wanted = torch.zeros(35, WIDTH, dtype=torch.float64)
            for index in members:
                member = list(pool)[index]
                _, padded = clips.key(member.encoder)
                length = clips.lengths[row : row + 1]
                features = member.encoder.front_end(clips.wave[row : row + 1], length, padded)
                wanted += weights[mixture, row, index] * member(features, length, base_frames(1, 35))[0]
            torch.testing.assert_close(mixed[mixture][row], wanted, atol=1e-10, rtol=1e-8)


def count_calls(pool: WeakEncoderPool) -> list[tuple[int, int]]:
    """Record (member, clips) of every encoder call from now on."""
    calls: list[tuple[int, int]] = []

    def watch(index: int) -> Callable[..., None]:
        return lambda module, args, output: calls.append((index, len(args[0])))

    for index, member in enumerate(pool):
        member.encoder.register_forward_hook(watch(index))
    return calls


def test_only_chosen_members_run_on_only_their_clips() -> None:
    pool = make_pool().eval()
    calls = count_calls(pool)
    run(pool, CHOSEN)
    assert calls == [(0, 2), (1, 3)]


def test_in_training_idle_members_are_entered_in_order() -> None:
    pool = make_pool().train()
    calls = count_calls(pool)
    mixed, _ = run(pool, CHOSEN)
    assert calls == [(0, 2), (1, 3), (2, 1)]
    torch.stack(mixed).sum().backward()
    idle = [p.grad for p in list(pool)[2].parameters() if p.requires_grad]
    assert idle
    assert all(grad is not None and (grad == 0).all() for grad in idle)


def test_idle_members_are_entered_outside_training_on_demand() -> None:
    pool = make_pool().eval()
    calls = count_calls(pool)
    run(pool, CHOSEN, enter_idle=True)
    assert [member for member, _ in calls] == [0, 1, 2]


def test_equal_front_ends_are_computed_once_for_the_clips_that_need_them() -> None:
    torch.manual_seed(0)
    encoders = [load_encoder(tiny_whisper_config(), seed)[0] for seed in range(3)]
    pool = WeakEncoderPool([PoolMember(e, WIDTH, "last") for e in encoders], "sparse").double().eval()
    clips = make_clips(0.7, 0.5, 0.6)
    weights, mask = choices(3, chosen=[[[0], [], [1]]])
    pool(clips, mixtures(weights, mask), base_frames(3, 35), 35, enter_idle=False)
    ((rows, features),) = clips.features.values()
    assert rows == [0, 2]
    assert len(features) == 2


@pytest.mark.parametrize("features", ["last", "layer:0", "layer:1", "layer:2", "weighted_sum"])
def test_feature_choices_are_hidden_states(features: str) -> None:
    encoder, _ = load_encoder(tiny_hubert_config(), 0)
    member = PoolMember(encoder, WIDTH, features).eval()
    wave = torch.from_numpy(waves(0.5)[0])[None]
    lengths = torch.tensor([8000])
    values = encoder.front_end(wave, lengths, 8000)
    states = encoder.model(values, output_hidden_states=True).hidden_states
    if member.layer_weights is not None:
        member.layer_weights.data = torch.tensor([0.5, -1.0, 2.0])
        p = np.exp([0.5, -1.0, 2.0]) / np.exp([0.5, -1.0, 2.0]).sum()
        wanted = sum(float(w) * s for w, s in zip(p, states, strict=True))
    else:
        wanted = states[-1 if features == "last" else int(features[-1])]
    got = member(values, lengths, base_frames(1, 24))
    torch.testing.assert_close(got, member.projection(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("features", ["layer:3", "layer:-1", "layers:1", "first", "layer:"])
def test_unknown_features_are_refused(features: str) -> None:
    encoder, _ = load_encoder(tiny_hubert_config(), 0)
    with pytest.raises(ValueError, match=r"model\.weak_encoders.*features"):
        PoolMember(encoder, WIDTH, features)


def test_frozen_member_keeps_eval_and_builds_no_graph() -> None:
    encoder, _ = load_encoder(tiny_hubert_config(hidden_dropout=0.5), 0)
    encoder.requires_grad_(False)
    member = PoolMember(encoder, WIDTH, "weighted_sum").train()
    assert member.training
    assert not any(module.training for module in encoder.modules())
    values = torch.randn(1, 8000)
    states = encoder(values)
    assert isinstance(states, Tensor)
    assert not states.requires_grad
    frames = member(values, torch.tensor([8000]), base_frames(1, 24))
    frames.square().sum().backward()
    assert member.layer_weights is not None
    assert member.layer_weights.grad is not None


def test_a_clip_does_not_hear_its_neighbours(make_model: MakeModel) -> None:
    """Within one padded length, the clip's tokens are the same alone and in company."""
    tower: AudioTower = make_model().audio_tower.eval()
    clips = make_clips(0.7, 0.5, 0.7)
    together = tower(clips.wave, clips.lengths)
    assert isinstance(tower.base_encoder, AudioEncoder)
    for row in (0, 2):
        alone = tower(clips.wave[row : row + 1], clips.lengths[row : row + 1])
        torch.testing.assert_close(alone.tokens[0], together.tokens[row], atol=1e-5, rtol=1e-5)
