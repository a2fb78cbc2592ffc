from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.adapter import ADAPTERS
from mowe_ray.model.building import (
    Lora,
    WeakEncoder,
    build_model,
    build_processor,
    untouched_parameters,
)
from tests.tiny_models import (
    ENCODER_CONFIGS,
    LANGUAGE_MODEL_FAMILIES,
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_whisper_config,
)
from tests.unit.model.conftest import MakeModel, waves

MakeBatch = Callable[..., dict[str, torch.Tensor]]

ROWS = [[0.5], [0.9, 0.6], []]


def routers_of(model: MoweForConditionalGeneration) -> dict[str, torch.nn.Parameter]:
    tower = model.audio_tower
    return {name: p for name, p in tower.named_parameters() if "_router." in name}


def test_loss_is_the_mean_over_answer_tokens_of_full_logits(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(mowe_loss_weight=0.3).eval()
    batch = make_batch(model, ROWS)
    output = model(**batch)
    assert output.logits.shape[:2] == batch["input_ids"].shape
    logits, targets = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    wanted = F.cross_entropy(logits, targets, ignore_index=-100)
    torch.testing.assert_close(output.lm_loss, wanted)
    torch.testing.assert_close(output.loss, wanted + 0.3 * output.routing_loss)


# What comes after the head: a cap, a factor, a divisor.
AFTER_THE_HEAD: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.02},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}


@pytest.mark.parametrize("family", [*LANGUAGE_MODEL_FAMILIES, *AFTER_THE_HEAD])
def test_training_computes_only_the_answers_logits_and_the_same_loss(
    family: str, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    config = tiny_language_model_config(family, **AFTER_THE_HEAD.get(family, {}))
    weak = [WeakEncoder("w", tiny_whisper_config(), "full")]
    model = make_model(weak_encoders=weak, language_model=config, lora=Lora()).eval()
    batch = make_batch(model, ROWS)
    wanted = model(**batch)
    answers = wanted.logits[:, :-1][batch["labels"][:, 1:] != -100]
    model.train()
    computed: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: computed.append(out[..., 0].numel()))
    output = model(**batch)
    torch.testing.assert_close(output.logits, answers)
    torch.testing.assert_close(output.loss, wanted.loss)
    assert computed == [len(answers)]
    nothing = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert nothing.logits.shape == (0, answers.shape[1])
    nothing.loss.backward()  # ranks without an answer take part all the same
    assert all(p.grad is not None for p in model.language_model.parameters() if p.requires_grad)


@pytest.mark.parametrize("k", [1, 2])
def test_language_model_loss_alone_trains_both_routers(make_model: MakeModel, make_batch: MakeBatch, k: int) -> None:
    model = make_model(mowe_loss_weight=0.0, router_top_k=k).train()
    model(**make_batch(model, ROWS)).loss.backward()
    for name, parameter in routers_of(model).items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"router_data_independent": False}, 2),
        ({"router_data_dependent": False}, 1),
        ({"fusion": "concat"}, 0),
        ({"fusion": "average"}, 0),
        ({"weak_encoders": []}, 0),
    ],
)
def test_routers_can_be_off(make_model: MakeModel, make_batch: MakeBatch, options: dict[str, Any], count: int) -> None:
    model = make_model(**options).train()
    assert len(routers_of(model)) == count
    output = model(**make_batch(model, ROWS))
    output.loss.backward()
    assert untouched_parameters(model) == []
    if not count:
        assert output.routing_loss == 0


@pytest.mark.slow
def test_concat_and_average_are_what_they_say(make_model: MakeModel) -> None:
    wave, lengths = torch.from_numpy(waves(0.5)[0])[None], torch.tensor([8000])
    seen: dict[str, torch.Tensor] = {}
    towers = {fusion: make_model(fusion=fusion).audio_tower.eval() for fusion in ("concat", "average")}
    towers["average"].pool.load_state_dict(towers["concat"].pool.state_dict())
    for fusion, tower in towers.items():
        tower.adapter.register_forward_pre_hook(lambda module, args, fusion=fusion: seen.update({fusion: args[0]}))
        tower(wave, lengths)
    base, first, second = seen["concat"].split(32, dim=-1)
    torch.testing.assert_close(seen["average"], torch.cat([base, (first + second) / 2], -1))


@pytest.mark.slow
def test_dense_execution_gives_the_same_model(make_model: MakeModel, make_batch: MakeBatch) -> None:
    logits = []
    for execution in ("sparse", "dense"):
        model = make_model(router_execution=execution).eval()
        logits.append(model(**make_batch(model, ROWS)).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_rows_get_their_own_clips_in_order(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """A row's logits are those it has alone, beside rows with other numbers of clips."""
    model = make_model().eval()
    batch = make_batch(model, [[0.9], [0.9, 0.6], []])
    together = model(**batch).logits
    clip = 0
    for row, count in enumerate([1, 2, 0]):
        alone = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        if count:
            alone |= {n: batch[n][clip : clip + count] for n in ("input_values", "input_lengths")}
        clip += count
        length = int(alone["attention_mask"].sum())
        got = model(**alone).logits[0, :length]
        torch.testing.assert_close(got, together[row, :length], atol=1e-4, rtol=1e-4)


def test_text_alone_leaves_zero_gradients_on_the_audio_side(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().train()
    output = model(**make_batch(model, [[], []]))
    output.loss.backward()
    assert untouched_parameters(model) == []
    assert output.routing.clips == 0
    assert output.routing_loss == 0
    for name, parameter in model.audio_tower.named_parameters():
        assert parameter.grad is None or (parameter.grad == 0).all(), name


def test_text_alone_is_not_changed_by_the_audio_side(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    batch = make_batch(model, [[], []])
    plain = model.language_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(model(**batch).logits, plain)
    model.enter_idle_encoders = True
    entered = []
    for encoder in model.audio_tower.encoders():
        encoder.register_forward_hook(lambda module, args, out: entered.append(module))
    assert torch.equal(model(**batch).logits, plain)
    assert entered == model.audio_tower.encoders()


@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_number_of_audio_tokens_is_refused(make_model: MakeModel, make_batch: MakeBatch, change: int) -> None:
    model = make_model().eval()
    batch = make_batch(model, [[0.5]])
    where = (batch["input_ids"] == model.config.audio_token_id).sum(1) if change < 0 else 5
    batch["input_ids"][0, int(where) - 1 if change < 0 else -1] = 7 if change < 0 else model.config.audio_token_id
    with pytest.raises(ValueError, match="audio tokens"):
        model(**batch)


def test_audio_tokens_without_audio_are_refused(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    batch = make_batch(model, [[0.5]])
    del batch["input_values"], batch["input_lengths"]
    with pytest.raises(ValueError, match="audio tokens"):
        model(**batch)


def test_spec_augment_masks_only_in_training_even_if_the_base_is_frozen(
    make_model: MakeModel, make_batch: MakeBatch
) -> None:
    options = {"weak_encoders": [], "spec_augment": {"mask_prob": 0.3, "mask_length": 5}}
    model, plain = make_model(**options), make_model(weak_encoders=[])
    assert model.audio_tower.base_encoder.frozen
    batch = make_batch(model, [[1.0]])
    torch.testing.assert_close(model.eval()(**batch).loss, plain.eval()(**batch).loss)
    model.train()
    assert not model.audio_tower.base_encoder.training
    torch.manual_seed(0)
    losses = [model(**batch).lm_loss.item() for _ in range(3)]
    assert len(set(losses)) == 3


@pytest.mark.slow
def test_router_noise_only_in_training(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(router_noise=1.0)
    batch = make_batch(model, [[0.5], [0.6]])

    def probabilities() -> torch.Tensor:
        routing = model(**batch).routing
        return torch.cat([routing.independent.probabilities[None], routing.dependent.probabilities])

    model.eval()
    assert torch.equal(probabilities(), probabilities())
    model.train()
    one, two = probabilities(), probabilities()
    assert (one != two).all()


@pytest.mark.parametrize("family", LANGUAGE_MODEL_FAMILIES)
def test_audio_reaches_every_language_model_unscaled(family: str) -> None:
    """Gemma scales token embeddings inside its embedding module; audio must come after it."""
    tokenizer = tiny_tokenizer(chat_template=True)
    model = build_model(
        base_encoder=tiny_whisper_config(),
        language_model=tiny_language_model_config(family),
        tokenizer=tokenizer,
    ).eval()
    processor = build_processor(model, tokenizer)
    batch = dict(processor(["What?"], [waves(0.5)], ["yes"]))
    seen: list[torch.Tensor] = []
    decoder = model.language_model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**batch)
    tokens = model.audio_tower(batch["input_values"], batch["input_lengths"]).tokens
    is_audio = batch["input_ids"] == model.config.audio_token_id
    torch.testing.assert_close(seen[0][is_audio], tokens[0])
    text = model.get_input_embeddings()(batch["input_ids"])[~is_audio]
    torch.testing.assert_close(seen[0][~is_audio], text)


@pytest.mark.parametrize("family", [*LANGUAGE_MODEL_FAMILIES, "mamba"])
def test_generation_continues_like_forward(family: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    model = build_model(
        base_encoder=tiny_whisper_config(),
        weak_encoders=[WeakEncoder("h", tiny_hubert_config())],
        language_model=tiny_language_model_config(family),
        tokenizer=tokenizer,
    ).eval()
    processor = build_processor(model, tokenizer)
    prompt = dict(processor(["What?"], [waves(0.5)]))
    ids = prompt["input_ids"]
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert torch.equal(written[:, : ids.shape[1]], ids)
    new = written[:, ids.shape[1] :]
    assert new.shape == (1, 4)
    for token in new[0]:
        logits = model(**prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        logits[..., model.config.audio_token_id] = -torch.inf
        assert logits[0, -1].argmax() == token
        ids = torch.cat([ids, token.view(1, 1)], dim=1)


def test_generation_of_a_batch_pads_left_and_takes_options(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    prompts = make_batch(model, ROWS, answers=False)
    length = prompts["input_ids"].shape[1]
    together = model.generate(**prompts, max_new_tokens=3, num_beams=2, num_return_sequences=2, synced_gpus=False)
    assert together.shape[0] == 6
    assert length < together.shape[1] <= length + 3
    assert torch.equal(together[:, :length], prompts["input_ids"].repeat_interleave(2, 0))
    alone = make_batch(model, ROWS[:1], answers=False)
    greedy = model.generate(**prompts, max_new_tokens=3, do_sample=False)
    single = model.generate(**alone, max_new_tokens=3, do_sample=False)
    new = single[0, alone["input_ids"].shape[1] :].tolist()
    assert greedy[0, length : length + len(new)].tolist() == new


@pytest.mark.slow
@pytest.mark.parametrize("train", ["frozen", "full", "lora"])
@pytest.mark.parametrize("family", ENCODER_CONFIGS)
def test_every_trainable_tensor_gets_a_gradient(
    make_model: MakeModel, make_batch: MakeBatch, family: str, train: str
) -> None:
    weak = [
        WeakEncoder(features, ENCODER_CONFIGS[family](), train, features)
        for features in ("last", "layer:1", "weighted_sum")
    ]
    model = make_model(base_encoder=ENCODER_CONFIGS[family](), train_base=train, weak_encoders=weak)
    model.train()
    trainable = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert ("base_encoder" in trainable) == (train != "frozen")
    encoders = model.audio_tower.encoders()
    assert all(encoder.frozen == (train == "frozen") for encoder in encoders)
    output = model(**make_batch(model, [[0.5], [0.7]]))
    output.loss.backward()
    assert untouched_parameters(model) == []


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, Lora(r=2, alpha=4)])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_trains_with_and_without_lora(
    make_model: MakeModel, make_batch: MakeBatch, adapter: str, lora: Lora | None
) -> None:
    model = make_model(adapter=adapter, lora=lora).train()
    model(**make_batch(model, ROWS)).loss.backward()
    assert untouched_parameters(model) == []
    embeddings = model.get_input_embeddings().weight
    assert embeddings.requires_grad == (lora is None)


@pytest.mark.slow
def test_adapter_learns(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """A few steps on one batch bring the loss down: gradients point the right way."""
    model = make_model().train()
    batch = make_batch(model, [[0.5], [0.7]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_bfloat16_runs_with_routing_and_losses_in_float32(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(dtype=torch.bfloat16, lora=Lora(), train_base="lora").train()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    output = model(**make_batch(model, ROWS))
    assert output.loss.dtype == torch.float32
    assert output.routing.dependent.probabilities.dtype == torch.float32
    output.loss.backward()
    assert untouched_parameters(model) == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(make_model: MakeModel, make_batch: MakeBatch) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model(train_base="full", lora=Lora()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert model.is_activation_checkpointing
        torch.manual_seed(0)
        model(**make_batch(model, ROWS)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], msg=name)
