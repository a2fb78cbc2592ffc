import pytest
import torch

from mowe_ray.model.routing import (
    DataDependentRouter,
    DataIndependentRouter,
    masked_mean,
    route,
    router_inputs,
    top_k_mask,
    top_k_weights,
)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_top_k_keeps_the_softmax_over_all_members(k: int) -> None:
    probabilities = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weights = top_k_weights(probabilities, k)
    for row, kept in zip(probabilities.tolist(), weights.tolist(), strict=True):
        largest = sorted(row, reverse=True)[:k]
        assert kept == [p if p in largest else 0.0 for p in row]


def test_ties_go_to_the_lower_index() -> None:
    assert top_k_mask(torch.full((4,), 0.25), 2).tolist() == [True, True, False, False]


def test_single_weight_passes_a_gradient_to_all_logits() -> None:
    logits = torch.tensor([0.3, 0.1, -0.2], requires_grad=True)
    route(logits, k=1, temperature=1.0, noise=None).weights.sum().backward()
    assert logits.grad is not None
    assert (logits.grad != 0).all()


def test_temperature_divides_and_noise_adds() -> None:
    logits, noise = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, -3.0, 0.75]])
    routing = route(logits, k=1, temperature=2.0, noise=noise)
    torch.testing.assert_close(routing.probabilities, (logits / 2 + noise).softmax(-1))
    assert routing.chosen.tolist() == [[False, False, True]]
    assert torch.equal(routing.logits, logits)


def test_an_earlier_choice_is_kept() -> None:
    chosen = torch.tensor([False, True])
    routing = route(torch.tensor([5.0, 0.0]), k=1, temperature=1.0, noise=None, chosen=chosen)
    assert routing.chosen is chosen
    assert routing.weights[0] == 0


def test_only_valid_frames_count() -> None:
    features = torch.randn(2, 6, 3)
    valid = torch.tensor([6, 2])
    mean = masked_mean(features, valid)
    torch.testing.assert_close(mean[1], features[1, :2].mean(0))
    features[1, 2:] = 1e6
    assert torch.equal(masked_mean(features, valid), mean)


def test_routers_decide_in_float32() -> None:
    dependent = DataDependentRouter(3, 4).to(torch.bfloat16)
    features = torch.randn(2, 6, 3, dtype=torch.bfloat16)
    logits = dependent(router_inputs("audio", features, torch.tensor([6, 2]), None, per_frame=False))
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 4)
    assert DataIndependentRouter(4).to(torch.bfloat16)().dtype == torch.float32


def test_absent_members_leave_their_probability_to_the_others() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    absent = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    routing = route(logits, k=3, temperature=1.0, noise=None, absent=absent)
    torch.testing.assert_close(routing.probabilities[0, [0, 2]], logits[0, [0, 2]].softmax(-1))
    assert routing.chosen.sum(-1).tolist() == [2, 0, 3]
    assert not (routing.chosen & absent).any()
    assert (routing.probabilities[1] == 0).all()
    torch.testing.assert_close(routing.whole_pool, logits.softmax(-1))
    routing.weights.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[[0, 2]].any(-1).all()


def test_padding_chooses_no_member() -> None:
    valid = torch.tensor([[True, True, False], [True, False, False]])
    routing = route(torch.randn(2, 3, 4), k=2, temperature=1.0, noise=None, valid=valid)
    assert torch.equal(routing.chosen.sum(-1), 2 * valid)
    load = routing.per_clip(routing.chosen.float())
    torch.testing.assert_close(load[0], routing.chosen[0, :2].float().mean(0))
    torch.testing.assert_close(load[1], routing.chosen[1, 0].float())
    assert float(routing.count) == 3
    assert routing.select([1]).chosen.shape == (1, 3, 4)


@pytest.mark.parametrize("per_frame", [False, True])
def test_routers_read_what_they_are_told(per_frame: bool) -> None:
    features, prompts, valid = torch.randn(2, 6, 3), torch.randn(2, 5), torch.tensor([6, 2])
    audio, prompt, both = (
        router_inputs(kind, features, valid, prompts, per_frame=per_frame)
        for kind in ("audio", "prompt", "audio+prompt")
    )
    scaled = (prompts - prompts.mean(-1, keepdim=True)) / (prompts.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(audio, features if per_frame else masked_mean(features, valid))
    torch.testing.assert_close(prompt, scaled[:, None].expand(2, 6, 5) if per_frame else scaled)
    assert torch.equal(both, torch.cat([audio, prompt], -1))
