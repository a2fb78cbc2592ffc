"""States of frozen encoders that are handed in: the same model as with the encoders running, which then do not run."""

from typing import Any

import pytest
import torch
from torch import nn

from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.building import WeakEncoder
from mowe_ray.model.hidden_states import chosen_layers
from mowe_ray.model.pool import Clips, PoolMember
from tests.tiny_models import tiny_hubert_config, tiny_wav2vec2_config, tiny_whisper_config

FEATURES = ("last", "layer:1", "weighted_sum")


def known_states(
    model: MoweForConditionalGeneration, batch: dict[str, Any], *, cut: bool = True
) -> dict[int, torch.Tensor]:
    """What every frozen encoder makes of the batch; `cut`, each clip ends at its own length, padded with zeros."""
    tower = model.audio_tower
    clips = Clips(batch["input_values"], batch["input_lengths"])
    rows = torch.arange(len(clips.lengths))
    states = {}
    for place, encoder in enumerate(tower.encoders()):
        if not encoder.frozen:
            continue
        member = None if place == 0 else tower.pool.members[place - 1]
        clips.compute([(clips.key(encoder), rows)])
        with torch.no_grad():
            choice = member.choice if isinstance(member, PoolMember) else "last"
            layers = chosen_layers(encoder, choice, clips.take(clips.key(encoder), rows), clips.lengths)
        states[place] = torch.stack(layers, 1)
        if cut:
            valid = encoder.num_frames(clips.lengths)
            own = torch.arange(int(valid.max())) < valid[:, None]
            states[place] = states[place][:, :, : int(valid.max())] * own[:, None, :, None]
    return states


def without_audio(states: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {place: known[:0, :, :1] for place, known in states.items()}


def forbid(model: MoweForConditionalGeneration, states: dict[int, torch.Tensor]) -> None:
    def fail(module: nn.Module, *_: Any) -> None:
        raise AssertionError(f"{type(module).__name__} ran")

    for place in states:
        model.audio_tower.encoders()[place].register_forward_pre_hook(fail)


@pytest.fixture
def make_pool(make_model):
    """A frozen base; a frozen Whisper with a choice of features, a trained HuBERT and a frozen Wav2Vec2."""

    def make(features: str, **changes: Any) -> MoweForConditionalGeneration:
        weak = [
            WeakEncoder("frozen", tiny_whisper_config(d_model=16), features=features),
            WeakEncoder("trained", tiny_hubert_config(hidden_dropout=0.0, attention_dropout=0.0), train="full"),
            WeakEncoder("idle", tiny_wav2vec2_config(), features=features),
        ]
        return make_model(weak_encoders=weak, **changes).train()

    return make


def send_all_to(model: MoweForConditionalGeneration, member: int) -> None:
    for logits in (model.audio_tower.independent_router.logits, model.audio_tower.dependent_router.bias):
        logits.data[member] = 5.0


def outcome(model: MoweForConditionalGeneration, batch: dict[str, Any], **more: Any) -> tuple[torch.Tensor, ...]:
    """Loss, logits and all gradients of a step in two passes, as on several ranks."""
    model.zero_grad()
    audio = {name: batch[name] for name in ("input_values", "input_lengths") if name in batch}
    torch.manual_seed(0)
    prepared = model(**audio, **more, prepare_only=True)
    text = {name: value for name, value in batch.items() if name not in audio}
    both = model(**text, routing_totals=prepared.totals, prepared_audio=prepared)
    both.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.manual_seed(0)
    one = model(**batch, **more)
    return both.loss, one.loss, one.logits, gradients


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("execution", ["sparse", "dense"])
@pytest.mark.parametrize("features", FEATURES)
def test_loss_and_gradients_are_those_of_running_encoders(make_pool, make_batch, features, execution, cut):
    model = make_pool(features, router_execution=execution, router_noise=0.5)
    batch = make_batch(model, [[1.0], [0.6], [], [0.8]])
    states = known_states(model, batch, cut=cut)
    assert {place: known.shape[1] for place, known in states.items()} == {
        place: 3 if features == "weighted_sum" and place else 1 for place in (0, 1, 3)
    }
    expected = outcome(model, batch)
    forbid(model, states)
    found = outcome(model, batch, encoder_states=states)
    # Exact where the same numbers are added up in the same order: a member that runs on fewer clips, or a sum over 50
    # frames instead of 250 of which 200 are zero, rounds otherwise (one unit in the last place is 1.2e-7).
    exact = execution == "dense" and not cut
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert (one - other).abs().max() <= (0.0 if exact else 1e-6 * other.abs().max())
    assert found[3].keys() == expected[3].keys()
    for name, gradient in found[3].items():
        error = (gradient - expected[3][name]).abs().max()
        assert error <= (0.0 if exact else 1e-5 * expected[3][name].abs().max() + 1e-12), name


@pytest.mark.slow
@pytest.mark.parametrize("features", FEATURES)
def test_idle_members_and_silence_enter_no_encoder_that_is_known(make_pool, make_batch, features):
    """And every trainable tensor still gets a gradient, which is zero."""
    model = make_pool(features)
    send_all_to(model, 1)
    batch = make_batch(model, [[1.0], [0.6]])
    states = known_states(model, batch)
    silent = make_batch(model, [[], []])
    expected = [outcome(model, batch), outcome(model, silent)]
    forbid(model, states)
    found = [
        outcome(model, batch, encoder_states=states),
        outcome(model, silent, encoder_states=without_audio(states)),
    ]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for (*numbers, gradients), (*wanted, wanted_gradients) in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(numbers, wanted, strict=True))
        assert gradients.keys() == trainable
        assert [n for n, gradient in gradients.items() if not torch.equal(gradient, wanted_gradients[n])] == []
    projection = found[0][-1]["audio_tower.pool.members.0.projection.0.weight"]
    assert not torch.any(projection)


def test_generate_gives_the_same_answers(make_pool, make_batch):
    model = make_pool("weighted_sum").eval()
    batch = make_batch(model, [[1.0], [], [0.6]], answers=False)
    states = known_states(model, batch)
    arguments = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(**batch, **arguments)
    text = model.generate(**make_batch(model, [[]], answers=False), **arguments)
    forbid(model, states)
    found = model.generate(**batch, encoder_states=states, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(found.scores, expected.scores, strict=True))
    model.enter_idle_encoders = True  # as the ranks of a sharded model must
    silent = model.generate(**make_batch(model, [[]], answers=False), encoder_states=without_audio(states), **arguments)
    assert torch.equal(silent.sequences, text.sequences)


def test_states_in_another_type_are_cast(make_pool, make_batch):
    model = make_pool("last")
    batch = make_batch(model, [[1.0], [0.6]])
    states = {place: known.bfloat16() for place, known in known_states(model, batch).items()}
    rounded = {place: known.float() for place, known in states.items()}
    assert torch.equal(model(**batch, encoder_states=states).loss, model(**batch, encoder_states=rounded).loss)


def test_spec_augment_needs_the_encoder(make_pool, make_batch):
    model = make_pool("last", spec_augment={"mask_prob": 0.2, "mask_length": 5})
    batch = make_batch(model, [[1.0]])
    with pytest.raises(AssertionError, match="masked"):
        model(**batch, encoder_states=known_states(model, batch))
