"""What every audio encoder must keep to, for tests of your own: `check_encoder(CrepeEncoder)`.

Training, validation and exports rely on each of these: another batch, another padding, frozen or not, in bfloat16, and
built anew from its configuration, an encoder gives the frames that it promises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from mowe_ray.model.configuration_mowe import EncoderSpec
from mowe_ray.model.cost import encoder_cost
from mowe_ray.model.encoders import ENCODERS, AudioEncoder, ModuleEncoder, encoder_class, load_encoder

_ATOL, _RTOL = 1e-5, 1e-4


def check_encoder(encoder: type[ModuleEncoder] | AudioEncoder, config: Mapping[str, Any] | None = None) -> None:
    """Run all checks on an encoder.

    Args:
        encoder: A registered class, or an encoder with its weights; random ones will do.
        config: Values of its configuration, where a class is given.

    Raises:
        AssertionError: It does not keep to the contract; the message says how.
    """
    if isinstance(encoder, type):
        name = encoder.config_class.model_type
        assert ENCODERS.get(name) is encoder, f"{encoder.__name__} is not registered: @ENCODERS.register({name!r})"
        values = {"model_type": name, **(config or {})}
        encoder.check_config(values)
        encoder = load_encoder(values)[0]
    for check in CHECKS:
        check(encoder.eval().requires_grad_(True))


def features_of(encoder: AudioEncoder, lengths: Sequence[int], padded: int | None = None) -> Tensor:
    """Return the features of clips of noise, of so many samples, padded alike."""
    padded = padded or encoder.pad_samples(max(lengths), "bucket")
    noise = torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(1)) * 0.1
    return encoder.front_end(noise, torch.tensor(lengths), padded)


def _output(encoder: AudioEncoder, features: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    frames = encoder(features, lengths=None if lengths is None else torch.tensor(lengths))
    assert isinstance(frames, Tensor)
    return frames


def frames_follow_the_formula(encoder: AudioEncoder) -> None:
    """There are as many frames of `width` as `num_frames` says, and at least one."""
    for samples in (encoder.min_samples, 1_600, 12_345, 20_001):
        padded = encoder.pad_samples(samples, "bucket")
        frames = _output(encoder, features_of(encoder, [samples], padded))
        wanted = (1, encoder.num_frames(padded), encoder.width)
        assert frames.shape == wanted, f"{padded} samples give {tuple(frames.shape)}, by `frame_layers` {wanted}"
        assert frames.isfinite().all(), f"{samples} samples of noise give frames that are not finite"
        assert padded >= max(samples, encoder.min_samples)
        assert 1 <= encoder.num_frames(samples) <= encoder.num_frames(padded)


def frames_are_counted_alike_for_ints_and_tensors(encoder: AudioEncoder) -> None:
    """`num_frames` takes both."""
    samples = [1, 399, 400, 719, 720, 16_000, 432_000]
    assert encoder.num_frames(torch.tensor(samples)).tolist() == [encoder.num_frames(n) for n in samples]


def hidden_states_end_with_the_output(encoder: AudioEncoder) -> None:
    """`all_layers` gives L + 1 states of one shape."""
    features = features_of(encoder, [9_000])
    states, output = encoder(features, all_layers=True), _output(encoder, features)
    assert len(states) == encoder.num_layers + 1, f"{len(states)} hidden states of {encoder.num_layers} layers"
    assert {state.shape for state in states} == {output.shape}
    assert torch.equal(states[-1], output)
    assert len(states) == 1 or not torch.equal(states[0], states[1])


def a_clip_does_not_depend_on_its_neighbours(encoder: AudioEncoder) -> None:
    """The frames of a clip are the same in any batch."""
    together = _output(encoder, features_of(encoder, [16_000, 9_000], 32_000))
    alone = _output(encoder, features_of(encoder, [16_000], 32_000))
    assert_close(together[:1], alone, atol=_ATOL, rtol=_RTOL, msg="a clip has other frames in a batch than alone")


def padding_changes_nothing(encoder: AudioEncoder) -> None:
    """With `lengths`, the frames of a clip are those of the clip alone, unless the encoder `sees_padding`."""
    if encoder.sees_padding:
        return
    lengths = [16_000, 9_000, encoder.min_samples, 5_555]
    for padded in (encoder.pad_samples(16_000, "bucket"), 32_000):
        together = _output(encoder, features_of(encoder, lengths, padded), lengths)
        for row, length in enumerate(lengths):
            wave = torch.randn(4, 16_000, generator=torch.Generator().manual_seed(1))[row : row + 1, :length] * 0.1
            shortest = encoder.pad_samples(length, "bucket")
            alone = _output(encoder, encoder.front_end(wave, torch.tensor([length]), shortest), [length])
            count = encoder.num_frames(length)
            difference = (together[row, :count] - alone[0, :count]).abs().max().item()
            assert difference < 10 * _ATOL, (
                f"padding of {length} to {padded} samples changes frames by {difference:.2g}"
            )


def every_weight_learns(encoder: AudioEncoder) -> None:
    """Every trainable tensor gets a gradient, from the shortest clip as well, as ZeRO needs."""
    for lengths in ([16_000, 9_000], [encoder.min_samples]):
        encoder.train().zero_grad()
        _output(encoder, features_of(encoder, lengths), lengths).sum().backward()
        idle = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
        assert idle == [], f"no gradient for {', '.join(idle)}: freeze or remove what the frames do not depend on"


def a_frozen_encoder_builds_no_graph(encoder: AudioEncoder) -> None:
    """Frozen, it stays in eval mode inside a model that trains."""
    encoder.requires_grad_(False)
    nn.ModuleList([encoder]).train()
    features = features_of(encoder, [9_000])
    first = _output(encoder, features)
    assert not first.requires_grad, "a frozen encoder builds a graph"
    assert torch.equal(first, _output(encoder, features)), "a frozen encoder draws random numbers"


def recomputed_activations_give_the_same_gradients(encoder: AudioEncoder) -> None:
    """Gradient checkpointing changes memory alone."""
    lengths = [16_000, 9_000]
    features = features_of(encoder, lengths)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, Tensor]:
        encoder.zero_grad()
        torch.manual_seed(0)
        _output(encoder, features, lengths).square().sum().backward()
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    encoder.train()
    plain = gradients()
    encoder.enable_gradient_checkpointing()
    assert_close(gradients(), plain)


def an_export_can_rebuild_it(encoder: AudioEncoder) -> None:
    """Built from its configuration alone, without weights, and filled with its weights, it computes the same."""
    spec = EncoderSpec.from_dict(EncoderSpec("it", encoder.config, encoder.front_end).to_dict())
    with torch.device("meta"):
        again = encoder_class(spec.config)(spec.config, spec.front_end)
    again.load_state_dict(encoder.state_dict(), assign=True)
    lost = [name for name, buffer in again.named_buffers() if buffer.is_meta]
    if lost and not isinstance(encoder, ModuleEncoder):
        return  # transformers computes buffers of its own classes when it loads them
    assert lost == [], f"not in the weights, so lost in an export: {', '.join(lost)} (persistent=False?)"
    features = features_of(encoder, [9_000])
    assert_close(_output(again.eval(), features), _output(encoder, features))


def its_work_can_be_counted(encoder: AudioEncoder) -> None:
    """It runs on the meta device, where the dry run counts operations."""
    spec = EncoderSpec("it", encoder.config, encoder.front_end)
    with torch.device("meta"):
        on_meta = encoder_class(spec.config)(spec.config, spec.front_end)
    cost = encoder_cost(on_meta, 2.0)
    assert cost.parameters == sum(p.numel() for p in encoder.parameters())
    assert cost.gflops > 0, "no operations were counted"


def bfloat16_weights_take_float32_features(encoder: AudioEncoder) -> None:
    """On a GPU, weights and frames are bfloat16."""
    frames = _output(encoder.to(torch.bfloat16), features_of(encoder, [9_000]))
    assert frames.dtype == torch.bfloat16, f"bfloat16 weights give {frames.dtype}"
    assert frames.isfinite().all()


CHECKS: tuple[Callable[[AudioEncoder], None], ...] = (
    frames_follow_the_formula,
    frames_are_counted_alike_for_ints_and_tensors,
    hidden_states_end_with_the_output,
    a_clip_does_not_depend_on_its_neighbours,
    padding_changes_nothing,
    every_weight_learns,
    a_frozen_encoder_builds_no_graph,
    an_export_can_rebuild_it,
    its_work_can_be_counted,
    recomputed_activations_give_the_same_gradients,
    bfloat16_weights_take_float32_features,  # the last: it changes the weights
)
"""The checks, each of which takes an encoder in eval mode."""
