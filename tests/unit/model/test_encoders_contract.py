"""What every encoder family must keep to; a new one joins by a line in `tests/tiny_models.py`."""

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mowe_ray.model.encoder_clap import ClapAudioEncoder
from mowe_ray.model.encoder_sew import SEWAudioEncoder
from mowe_ray.model.encoders import ENCODERS, AudioEncoder, load_encoder
from mowe_ray.model.frontends import NormalisedWave
from mowe_ray.testing import CHECKS
from tests.tiny_models import ENCODER_CONFIGS

FAMILIES = [
    *((family, {}) for family in ENCODERS),
    ("wav2vec2", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    ("wavlm", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    ("hubert", {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    ("hubert", {"conv_bias": True, "conv_pos_batch_norm": True}),
    ("wav2vec2-conformer", {"position_embeddings_type": "rotary"}),
    ("sew", {"feat_extract_norm": "layer"}),
]


@pytest.fixture(params=FAMILIES, ids=lambda case: "-".join([case[0], *case[1]]))
def encoder(request: pytest.FixtureRequest) -> AudioEncoder:
    family, changes = request.param
    return load_encoder(ENCODER_CONFIGS[family](**changes))[0].eval()


def features_of(encoder: AudioEncoder, *lengths: int, padded: int | None = None) -> Tensor:
    padded = padded or encoder.pad_samples(max(lengths), "bucket")
    noise = torch.Generator().manual_seed(1)
    wave = torch.zeros(len(lengths), max(lengths))
    for row, length in zip(wave, lengths, strict=True):
        row[:length] = torch.randn(length, generator=noise) * 0.1
    return encoder.front_end(wave, torch.tensor(lengths), padded)


def all_trainable(encoder: AudioEncoder) -> dict[str, Tensor]:
    return {name: p for name, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_users_check_of_theirs_holds_for_ours(
    encoder: AudioEncoder, check: Callable[[AudioEncoder], None]
) -> None:
    check(encoder)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [400, 1_600, 12_345, 16_000, 40_001])
def test_frames_follow_the_formula(encoder: AudioEncoder, samples: int) -> None:
    padded = encoder.pad_samples(samples, "bucket")
    frames = encoder(features_of(encoder, samples, padded=padded))
    assert frames.shape == (1, encoder.num_frames(padded), encoder.width)
    assert padded >= max(samples, encoder.min_samples)
    assert 1 <= encoder.num_frames(samples) <= encoder.num_frames(padded)


def test_num_frames_is_the_same_for_ints_and_tensors(encoder: AudioEncoder) -> None:
    samples = [1, 399, 400, 719, 720, 16_000, 480_000]
    assert encoder.num_frames(torch.tensor(samples)).tolist() == [encoder.num_frames(n) for n in samples]


def test_shortest_clip_gives_one_finite_frame_or_more(encoder: AudioEncoder) -> None:
    padded = encoder.pad_samples(encoder.min_samples, "bucket")
    for samples in {padded} if isinstance(encoder, ClapAudioEncoder) else {padded, encoder.min_samples}:
        frames = encoder(features_of(encoder, encoder.min_samples, padded=samples))
        assert frames.shape[1] == encoder.num_frames(samples) >= 1
        assert frames.isfinite().all()


def test_hidden_states_run_from_the_first_layers_input_to_the_output(encoder: AudioEncoder) -> None:
    features = features_of(encoder, 9_000)
    states = encoder(features, all_layers=True)
    output = encoder(features)
    assert len(states) == encoder.num_layers + 1
    assert {state.shape for state in states} == {output.shape}
    assert torch.equal(states[-1], output)
    assert not torch.equal(states[0], states[1])


def test_a_clip_does_not_depend_on_its_neighbours(encoder: AudioEncoder) -> None:
    together = encoder(features_of(encoder, 16_000, 9_000, padded=80_000))
    alone = encoder(features_of(encoder, 16_000, padded=80_000))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_clips_frames_are_those_of_transformers_alone(encoder: AudioEncoder) -> None:
    """In a batch, alone, and padded further: what transformers makes of the unpadded clip, without a mask."""
    if not isinstance(encoder.front_end, NormalisedWave):
        pytest.skip("has a front-end: test_encoders_in_batches.py compares it with transformers' own")
    theirs = encoder.model_class(encoder.config).eval()
    lacking = theirs.load_state_dict(encoder.model.state_dict(), strict=False)
    assert {*lacking.missing_keys, *lacking.unexpected_keys} <= {
        "masked_spec_embed",  # read by its own masking alone
        "encoder.embed_positions.inv_freq",  # computed
    }
    lengths = [16_000, 9_000, encoder.min_samples, 5_555]
    wave = torch.randn(4, 16_000, generator=torch.Generator().manual_seed(2)) * 0.1
    for padded in (16_000, 80_000):
        valid = torch.tensor(lengths)
        together = encoder(encoder.front_end(wave, valid, padded), lengths=valid, all_layers=True)
        for row, length in enumerate(lengths):
            features = encoder.front_end(wave[row : row + 1, :length], valid[row : row + 1], length)
            alone = encoder(features, lengths=valid[row : row + 1], all_layers=True)
            output = theirs(features, output_hidden_states=True)
            wanted = (*output.hidden_states[:-1], output.last_hidden_state)
            for layer, ours, theirs_alone in zip(together, alone, wanted, strict=True):
                unmasked = theirs_alone
                if isinstance(encoder, SEWAudioEncoder) and unmasked is not wanted[-1]:  # one for every two frames
                    doubled = unmasked.repeat_interleave(2, 1)
                    unmasked = F.pad(doubled, (0, 0, 0, ours.shape[1] - doubled.shape[1]))
                torch.testing.assert_close(ours, unmasked, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(layer[row : row + 1, : ours.shape[1]], unmasked, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_recomputed_activations_see_the_same_padding(encoder: AudioEncoder) -> None:
    features, lengths = features_of(encoder, 16_000, 9_000), torch.tensor([16_000, 9_000])
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, Tensor]:
        encoder.zero_grad()
        torch.manual_seed(0)
        encoder(features, lengths=lengths).square().sum().backward()
        return {name: p.grad.clone() for name, p in all_trainable(encoder).items()}

    encoder.train()
    plain = gradients()
    encoder.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_every_trainable_tensor_gets_a_gradient(encoder: AudioEncoder) -> None:
    encoder.train()
    encoder(features_of(encoder, 16_000, 9_000), lengths=torch.tensor([16_000, 9_000])).sum().backward()
    assert [name for name, p in all_trainable(encoder).items() if p.grad is None] == []


def test_every_tensor_gets_a_gradient_from_the_shortest_clip(encoder: AudioEncoder) -> None:
    encoder.train()
    frames = encoder(features_of(encoder, encoder.min_samples, padded=encoder.min_samples))
    (0.0 * frames.sum()).backward()
    assert [name for name, p in all_trainable(encoder).items() if p.grad is None] == []


def test_training_mode_is_deterministic_without_dropout(encoder: AudioEncoder) -> None:
    """Neither layer dropping nor transformers' own masking may be left on."""
    for module in encoder.modules():
        for name in ("p", "dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    features = features_of(encoder, 30_000)
    evaluated = encoder.eval()(features)
    torch.testing.assert_close(encoder.train()(features), evaluated)


def test_frozen_encoder_stays_in_eval_and_builds_no_graph(encoder: AudioEncoder) -> None:
    encoder.requires_grad_(False)
    torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    features = features_of(encoder, 9_000)
    first = encoder(features)
    assert not first.requires_grad
    assert torch.equal(first, encoder(features))


def test_lora_targets_all_learn(encoder: AudioEncoder) -> None:
    config = peft.LoraConfig(r=2, target_modules=list(encoder.lora_targets))
    peft.inject_adapter_in_model(config, encoder.model)
    encoder.train()
    encoder(features_of(encoder, 16_000)).square().mean().backward()
    adapters = all_trainable(encoder)
    assert len(adapters) >= 2 * 2 * encoder.num_layers
    # B starts at zero, so it is B that must feel the loss; A gets a gradient of zeros.
    dead = [n for n, p in adapters.items() if p.grad is None or ("lora_B" in n and not p.grad.any())]
    assert dead == []


def test_gradient_checkpointing_changes_nothing(encoder: AudioEncoder) -> None:
    features = features_of(encoder, 16_000)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, Tensor]:
        encoder.zero_grad()
        torch.manual_seed(0)
        sum(state.sum() for state in encoder(features, all_layers=True)).backward()
        return {name: p.grad.clone() for name, p in all_trainable(encoder).items()}

    encoder.train()
    plain = gradients()
    encoder.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_bfloat16_weights_take_float32_features(encoder: AudioEncoder) -> None:
    frames = encoder.to(torch.bfloat16)(features_of(encoder, 9_000))
    assert frames.dtype == torch.bfloat16
    assert frames.isfinite().all()
