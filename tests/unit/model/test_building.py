from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mowe_ray.model.building import (
    PARTS,
    Lora,
    WeakEncoder,
    add_audio_token,
    build_model,
    build_processor,
    equal_members,
    load_language_model,
    parameter_parts,
    strong_members,
    untouched_parameters,
)
from mowe_ray.model.tokenizing import tokenizer_from_json, train_tokenizer
from mowe_ray.training.optimizer import scalar_parameters
from tests.tiny_models import (
    LANGUAGE_MODEL_FAMILIES,
    save_encoder_checkpoint,
    save_language_model,
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_whisper_config,
)
from tests.unit.model.conftest import MakeModel, waves

MakeBatch = Callable[..., dict[str, torch.Tensor]]


@pytest.mark.slow
@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("family", LANGUAGE_MODEL_FAMILIES)
def test_real_checkpoint_formats_train_and_generate(family: str, chat_template: bool, tmp_path: Path) -> None:
    save_encoder_checkpoint(tmp_path / "whisper", tiny_whisper_config())
    save_encoder_checkpoint(tmp_path / "hubert", tiny_hubert_config())
    saved = save_language_model(tmp_path / "llm", family, chat_template=chat_template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    model = build_model(
        base_encoder=str(tmp_path / "whisper"),
        weak_encoders=[
            WeakEncoder("whisper", str(tmp_path / "whisper"), "full"),
            WeakEncoder("hubert", str(tmp_path / "hubert"), "lora"),
        ],
        language_model=str(tmp_path / "llm"),
        tokenizer=tokenizer,
        lora=Lora(r=2, target_modules="all-linear"),
    )
    loaded = {n.replace(".base_layer.", "."): w for n, w in model.language_model.state_dict().items()}
    assert all(torch.equal(loaded[name], weight) for name, weight in saved.state_dict().items())
    processor = build_processor(model, tokenizer)
    model.train()
    model(**processor(["What?"], [waves(0.5)], ["yes"])).loss.backward()
    assert untouched_parameters(model) == []
    prompt = processor(["What?"], [waves(0.5)])
    new = model.eval().generate(**prompt, max_new_tokens=3)[:, prompt["input_ids"].shape[1] :]
    assert 1 <= new.shape[1] <= 3
    assert model.config.audio_token_id not in new


@pytest.mark.slow
def test_embeddings_grow_only_for_a_token_beyond_them(tmp_path: Path) -> None:
    for vocabulary, wanted in ((300, 301), (400, 400)):
        tokenizer = tiny_tokenizer(chat_template=False)
        save_language_model(tmp_path / str(vocabulary), "llama", vocab_size=vocabulary)
        tokenizer.add_tokens([f"<{i}>" for i in range(300 - len(tokenizer))])
        add_audio_token(tokenizer)
        model = load_language_model(str(tmp_path / str(vocabulary)), tokenizer, torch.float32)
        assert model.get_input_embeddings().num_embeddings == wanted
        assert model.config.vocab_size == wanted


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_grown_embeddings_stay_frozen_under_lora(tmp_path: Path, tied: bool) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    save_language_model(tmp_path, "qwen2", vocab_size=len(tokenizer), tie_word_embeddings=tied)
    model = build_model(
        base_encoder=tiny_whisper_config(),
        language_model=str(tmp_path),
        tokenizer=tokenizer,
        lora=Lora(r=2, target_modules=("q_proj", "v_proj")),
    )
    llm = model.language_model
    assert llm.get_input_embeddings().num_embeddings == len(tokenizer)
    assert not llm.get_input_embeddings().weight.requires_grad
    assert not llm.get_output_embeddings().weight.requires_grad
    assert (llm.get_input_embeddings().weight is llm.get_output_embeddings().weight) == tied
    trained = {n for n, p in llm.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


def test_inline_language_model_takes_sizes_from_the_tokenizer() -> None:
    tokenizer = train_tokenizer(["hello"], 300)
    config = tiny_language_model_config("llama")
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        del config[name]
    model = load_language_model(config, tokenizer, torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_generation_stops_at_the_processors_end(make_model: MakeModel) -> None:
    config = make_model().generation_config
    assert 1 in config.eos_token_id
    assert config.pad_token_id == 2


def test_missing_language_model_names_the_key(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"model\.language_model"):
        make_model(language_model="/nowhere/at/all")


def test_unknown_option_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(TypeError, match="router_topk"):
        make_model(router_topk=1)


@pytest.mark.slow
def test_seed_decides_all_weights_and_nothing_else(make_model: MakeModel) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = make_model(lora=Lora(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    two, three = make_model(lora=Lora(), seed=1), make_model(lora=Lora(), seed=2)
    for name, weight in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], weight), name
    changed = [n for n, w in one.state_dict().items() if not torch.equal(three.state_dict()[n], w)]
    assert {"adapter", "independent_router", "pool", "base_encoder"} <= {name.split(".")[1] for name in changed}


def test_members_start_differently(make_model: MakeModel) -> None:
    twins = [WeakEncoder(name, tiny_whisper_config(), "full") for name in ("a", "b")]
    first, second = make_model(weak_encoders=twins).audio_tower.pool
    assert not torch.equal(first.projection[0].weight, second.projection[0].weight)


def test_layer_weights_come_from_the_checkpoint(make_model: MakeModel, tmp_path: Path) -> None:
    saved = save_encoder_checkpoint(tmp_path, tiny_hubert_config(use_weighted_layer_sum=True), seed=4)
    with torch.no_grad():
        saved.layer_weights.copy_(torch.tensor([0.1, 0.7, 0.2]))
    saved.save_pretrained(tmp_path)
    member = WeakEncoder("er", str(tmp_path), features="weighted_sum")
    (loaded,) = make_model(weak_encoders=[member]).audio_tower.pool
    torch.testing.assert_close(loaded.layer_weights.detach(), torch.tensor([0.1, 0.7, 0.2]))
    assert loaded.layer_weights.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize(("train", "fate"), [("frozen", "stay equal"), ("full", "differ only by")])
def test_equal_members_are_named(make_model: MakeModel, tmp_path: Path, train: str, fate: str) -> None:
    save_encoder_checkpoint(tmp_path, tiny_hubert_config())
    weak = [
        WeakEncoder("a", str(tmp_path), train),
        WeakEncoder("b", str(tmp_path)),
        WeakEncoder("c", str(tmp_path), features="weighted_sum"),
        WeakEncoder("d", tiny_hubert_config()),
    ]
    (warning,) = equal_members(make_model(weak_encoders=weak))
    assert "'a' and 'b'" in warning
    assert fate in warning


def test_members_above_a_tenth_of_the_base_are_named(make_model: MakeModel) -> None:
    pool = [WeakEncoder("weak", tiny_hubert_config()), WeakEncoder("twin", tiny_whisper_config())]
    model = make_model(base_encoder=tiny_whisper_config(encoder_ffn_dim=8000), weak_encoders=pool)
    base, weak, twin = (sum(p.numel() for p in e.parameters()) for e in model.audio_tower.encoders())
    assert weak < base / 10 or twin < base / 10
    named = [name for name, size in (("weak", weak), ("twin", twin)) if size > base / 10]
    assert [warning.split("'")[1] for warning in strong_members(model)] == named
    assert len(strong_members(make_model(weak_encoders=pool))) == 2


def test_later_layers_than_the_chosen_one_are_frozen(make_model: MakeModel) -> None:
    weak = [WeakEncoder("h", tiny_hubert_config(), "full", "layer:1")]
    (member,) = make_model(weak_encoders=weak).audio_tower.pool
    layers = member.encoder.model.encoder.layers
    assert all(p.requires_grad for p in layers[0].parameters())
    assert not any(p.requires_grad for p in layers[1].parameters())


@pytest.mark.slow
def test_every_parameter_has_a_part(make_model: MakeModel) -> None:
    weak = [WeakEncoder(f"h{i}", tiny_hubert_config(), "full", "weighted_sum") for i in range(2)]
    options = {"weak_encoders": weak, "fusion": "cross_attention", "base_features": "weighted_sum"}
    model = make_model(lora=Lora(), train_base="lora", **options)
    parts = parameter_parts(model)
    assert parts.keys() == {name for name, _ in model.named_parameters()}
    assert set(parts.values()) == set(PARTS)
    by_part = {part: {name for name, own in parts.items() if own == part} for part in PARTS}
    assert all("_router." in name for name in by_part["routers"])
    members = {f"pool.members.{i}.{scalar}" for i in range(2) for scalar in ("layer_weights", "fuse.gate")}
    scalars = {"base_layers.logits", "independent_router.logits", *members}
    assert set(scalar_parameters(model)) == {f"audio_tower.{name}" for name in scalars}
    assert any(".projection." in name for name in by_part["adapter"])
    assert not any(".encoder." in name for name in by_part["adapter"])


def test_untouched_parameters_are_found(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().train()
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(untouched_parameters(model)) == everything
    model(**make_batch(model, [[0.5]])).loss.backward()
    assert untouched_parameters(model) == []
    model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(1)))
    assert untouched_parameters(model) == ["forgotten"]


def test_trained_tokenizer_is_repeatable_and_writes_anything() -> None:
    texts = ["what do you hear?", "a dog barks", "a dog"] * 3
    one, two = train_tokenizer(texts, 300), train_tokenizer(list(texts), 300)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    again = tokenizer_from_json(one.backend_tokenizer.to_str())
    for text in ("a dog barks", "Grüße, 你好 \n\t~"):
        tokens = one(text)["input_ids"]
        assert one.decode(tokens) == text
        assert again(text)["input_ids"] == tokens
    assert len(one) <= 300
    assert again.eos_token_id == one.eos_token_id is not None
    assert again.pad_token_id == one.pad_token_id is not None


def test_tokenizer_needs_room_for_all_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(["a"], 100)
