"""Losses and gradients of micro-batches add up to those of their global batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mowe_ray.model import MoweForConditionalGeneration, PreparedAudio, RoutingTotals
from mowe_ray.model.building import Lora, WeakEncoder
from tests.tiny_models import tiny_hubert_config, tiny_whisper_config
from tests.unit.model.conftest import MakeModel

MakeBatch = Callable[..., dict[str, torch.Tensor]]
Batch = dict[str, torch.Tensor]

# Lengths of one bucket of Whisper, which computes with its padding; HuBERT computes a clip's own frames alone.
ROWS = [[0.6], [0.9, 0.4], [], [0.7], [0.5]]
SPLITS = [[[0], [1], [2], [3], [4]], [[0, 1], [2], [3, 4]], [[2], [0, 1, 3, 4]]]

NO_DROPOUT = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)


@pytest.fixture
def model(make_model: MakeModel, make_batch: MakeBatch) -> MoweForConditionalGeneration:
    weak = [
        WeakEncoder("whisper", tiny_whisper_config(d_model=16), "full"),
        WeakEncoder("hubert", tiny_hubert_config(**NO_DROPOUT), "lora"),
        WeakEncoder("frozen", tiny_whisper_config(d_model=16)),
    ]
    model = make_model(weak_encoders=weak, mowe_loss_weight=0.5, mowe_z_weight=0.1).double().train()
    # States of a random base differ little between clips: make the router depend on the differences alone.
    router = model.audio_tower.dependent_router
    with torch.no_grad():
        router.weight.mul_(1000)
        record = prepare(model, make_batch(model, ROWS)).record
        router.bias.sub_(record.dependent.logits.mean(0))
    return model


def take(batch: Batch, rows: list[int]) -> Batch:
    """Cut rows, with their clips, out of a batch."""
    starts = [sum(map(len, ROWS[:row])) for row in range(len(ROWS))]
    clips = [starts[row] + i for row in rows for i in range(len(ROWS[row]))]
    part = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")}
    if clips:
        part |= {name: batch[name][clips] for name in ("input_values", "input_lengths")}
    return part


def prepare(model: MoweForConditionalGeneration, part: Batch) -> PreparedAudio:
    prepared = model(
        input_values=part.get("input_values"),
        input_lengths=part.get("input_lengths"),
        prepare_only=True,
    )
    assert isinstance(prepared, PreparedAudio)
    return prepared


def gradients(model: MoweForConditionalGeneration) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def whole(model: MoweForConditionalGeneration, batch: Batch) -> tuple[Any, dict[str, torch.Tensor]]:
    output = model(**batch)
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["entropy_diversity", "load_balance", "importance_cv2"])
def test_sum_over_micro_batches_is_the_global_batch(
    model: MoweForConditionalGeneration, make_batch: MakeBatch, kind: str, split: list[list[int]]
) -> None:
    model.config.mowe_loss = kind
    batch = make_batch(model, ROWS)
    wanted, wanted_gradients = whole(model, batch)
    parts = [take(batch, rows) for rows in split]
    prepared = [prepare(model, part) for part in parts]
    vectors = torch.stack([p.totals.to_vector() for p in prepared])
    totals = RoutingTotals.from_vector(vectors.sum(0))
    assert totals.clips == 5
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    sums = torch.zeros(3, dtype=torch.float64)
    for part, audio in zip(parts, prepared, strict=True):
        output = model(**part, num_items_in_batch=tokens, routing_totals=totals, prepared_audio=audio)
        output.loss.backward()
        sums += torch.stack([output.loss, output.lm_loss, output.routing_loss]).detach().double()
    wanted_sums = torch.stack([wanted.loss, wanted.lm_loss, wanted.routing_loss]).detach().double()
    torch.testing.assert_close(sums, wanted_sums, atol=1e-6, rtol=1e-6)
    summed = gradients(model)
    assert summed.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        # Routing runs in float32 whatever the model's type.
        torch.testing.assert_close(summed[name], gradient, atol=1e-7, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_without_totals_the_diversity_term_is_not_the_global_one(
    model: MoweForConditionalGeneration, make_batch: MakeBatch
) -> None:
    """The sum above would hold for any loss that is linear in clips: here is the proof that it is not."""
    batch = make_batch(model, ROWS)
    wanted = model(**batch).routing_loss
    alone = [model(**take(batch, rows)) for rows in ([0, 1], [3, 4])]
    naive = sum(o.routing_loss * o.routing.clips / 5 for o in alone)
    assert (naive - wanted).abs() > 1e-4


@pytest.mark.parametrize("train_base", ["frozen", "full", "lora"])
def test_prepared_audio_repeats_the_same_draws(make_model: MakeModel, make_batch: MakeBatch, train_base: str) -> None:
    """Masks, dropout and router noise are those of the preparation, and later draws go on from there."""
    model = make_model(
        base_encoder=tiny_whisper_config(dropout=0.2),
        train_base=train_base,
        lora=Lora(r=2, dropout=0.3),
        router_noise=0.5,
        spec_augment={"mask_prob": 0.2, "mask_length": 5},
    ).train()
    batch = make_batch(model, [[0.6], [0.9]])
    torch.manual_seed(3)
    prepared = prepare(model, batch)
    assert (prepared.features is not None) == (train_base == "frozen")
    routing = model(**batch, prepared_audio=prepared).routing
    for name in ("independent", "dependent"):
        ours, theirs = getattr(routing, name), getattr(prepared.record, name)
        assert torch.equal(ours.chosen, theirs.chosen)
        torch.testing.assert_close(ours.probabilities.detach(), theirs.probabilities)
    torch.manual_seed(3)
    once = model(**batch)
    torch.testing.assert_close(once.routing.dependent.probabilities, routing.dependent.probabilities)


def test_prepared_audio_gives_the_same_loss(model: MoweForConditionalGeneration, make_batch: MakeBatch) -> None:
    batch = make_batch(model, ROWS)
    prepared = prepare(model, batch)
    assert not prepared.record.dependent.probabilities.requires_grad
    with_it = model(**batch, prepared_audio=prepared, routing_totals=prepared.totals)
    torch.testing.assert_close(with_it.loss, model(**batch).loss)


def test_batch_without_audio_has_empty_totals(model: MoweForConditionalGeneration, make_batch: MakeBatch) -> None:
    prepared = prepare(model, make_batch(model, [[]]))
    assert prepared.is_dummy
    assert prepared.totals.clips == 0
    assert (prepared.totals.probability_sum == 0).all()


def test_model_without_pool_shares_the_clip_count(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(weak_encoders=[])
    assert prepare(model, make_batch(model, ROWS)).totals.to_vector().tolist() == [5.0]


def test_routing_noise_is_drawn_per_clip(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(router_noise=1.0).train()
    prepared = prepare(model, make_batch(model, [[0.6], [0.6]]))
    independent, dependent = prepared.noise
    assert independent is not None
    assert dependent is not None
    assert dependent.shape == (2, len(independent))
    assert (dependent[0] != dependent[1]).all()
