import pytest
import torch

from mowe_ray.model.adapter import ADAPTERS, build_adapter

WIDTH, HIDDEN, OUT = 12, 16, 20


@pytest.fixture(params=ADAPTERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
@pytest.mark.parametrize("frames", [1, 7, 8, 9, 50])
def test_frames_become_the_ceiling_of_their_share(kind: str, frames: int, downsample: int) -> None:
    adapter = build_adapter(kind, WIDTH, HIDDEN, OUT, downsample)
    tokens = adapter(torch.randn(2, frames, WIDTH), torch.tensor([frames, 1]))
    assert tokens.shape == (2, -(-frames // downsample), OUT)
    assert torch.isfinite(tokens).all()


@pytest.mark.parametrize("frames", [1, 5, 8, 11, 16])
def test_result_does_not_depend_on_padding(kind: str, frames: int) -> None:
    torch.manual_seed(0)
    adapter = build_adapter(kind, WIDTH, HIDDEN, OUT, 8).double()
    clip = torch.randn(1, frames, WIDTH, dtype=torch.float64)
    alone = adapter(clip, torch.tensor([frames]))
    padding = 100 * torch.randn(1, 21, WIDTH, dtype=torch.float64)
    padded = adapter(torch.cat([clip, padding], dim=1), torch.tensor([frames]))
    assert (padded[:, : alone.shape[1]] - alone).abs().max() < 1e-12


def test_all_weights_get_a_gradient(kind: str) -> None:
    adapter = build_adapter(kind, WIDTH, HIDDEN, OUT, 8)
    features = torch.randn(2, 20, WIDTH, requires_grad=True)
    adapter(features, torch.tensor([20, 9])).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert features.grad is not None
    assert (features.grad[1, 9:] == 0).all()
    assert (features.grad[1, :9].abs().sum(-1) > 0).all()


def test_order_within_a_window_matters(kind: str) -> None:
    adapter = build_adapter(kind, WIDTH, HIDDEN, OUT, 8)
    features = torch.randn(1, 8, WIDTH)
    valid = torch.tensor([8])
    # A freshly drawn Q-Former listens to positions only weakly.
    difference = (adapter(features, valid) - adapter(features.flip(1), valid)).abs().max()
    assert difference > 1e-6


def test_seqcnn_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match=r"model\.adapter\.downsample"):
        build_adapter("seqcnn", WIDTH, HIDDEN, OUT, 6)
    build_adapter("stack_mlp", WIDTH, HIDDEN, OUT, 6)


def test_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.adapter\.kind.*seqcnn"):
        build_adapter("cnn", WIDTH, HIDDEN, OUT, 8)


def test_merged_experts_are_one_network_of_their_weighted_sums() -> None:
    """SMEAR: the parameters are merged first, with the weights that the token's own router gives, then used."""
    torch.manual_seed(0)
    adapter = build_adapter("moe_mlp", WIDTH, HIDDEN, OUT, 4).double()
    features = torch.randn(1, 8, WIDTH, dtype=torch.float64)
    tokens = adapter(features, torch.tensor([8]))
    for number, window in enumerate(features[0].reshape(2, 4 * WIDTH)):
        weights = (adapter.router.weight @ window + adapter.router.bias).softmax(0)
        layers = adapter.inner, adapter.proj
        merged = [torch.einsum("e,eoi->oi", weights, layer.weight.unflatten(0, (len(weights), -1))) for layer in layers]
        biases = [weights @ layer.bias.unflatten(0, (len(weights), -1)) for layer in layers]
        hidden = torch.nn.functional.gelu(merged[0] @ window + biases[0])
        torch.testing.assert_close(tokens[0, number], merged[1] @ hidden + biases[1], rtol=1e-6, atol=1e-7)
