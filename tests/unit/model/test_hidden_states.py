"""Which hidden states a choice of features takes, for members of the pool and for the base encoder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, PreTrainedTokenizerBase

from mowe_ray.model.building import WeakEncoder, build_processor, parameter_parts
from mowe_ray.model.encoders import load_encoder
from mowe_ray.model.export import export
from mowe_ray.model.hidden_states import LayerSum, chosen_layers, layers_of
from mowe_ray.model.pool import Clips
from tests.tiny_models import tiny_hubert_config
from tests.unit.model.conftest import MakeModel

MakeBatch = Callable[..., dict[str, torch.Tensor]]
CHOICES = ["last", "layer:0", "layer:1", "layers:[0, 2]", "layers:[1]", "weighted_sum"]
NEEDED = {"last": [2], "layer:0": [0], "layer:1": [1], "layers:[0, 2]": [0, 2], "layers:[1]": [1]}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_the_softmaxed_sum_of_its_layers(choice: str) -> None:
    encoder = load_encoder(tiny_hubert_config())[0].eval()
    wave = torch.randn(2, 8_000)
    every = [layer.double() for layer in encoder(wave, all_layers=True)]
    chooser = LayerSum(choice, encoder.num_layers)
    logits = torch.linspace(-1, 1, len(layers_of(choice, 2)))
    if chooser.logits is not None:
        chooser.logits.data = logits
    mixed = chooser(chosen_layers(encoder, choice, wave, None))
    needed = NEEDED.get(choice, [0, 1, 2])
    wanted = sum(
        weight * every[layer] for weight, layer in zip(logits.double().softmax(0).tolist(), needed, strict=True)
    )
    torch.testing.assert_close(mixed.double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("choice", ["layer:3", "layers:[1, 3]", "layers:[]", "first", "layers:1"])
def test_a_choice_that_the_encoder_has_not_is_refused(choice: str) -> None:
    with pytest.raises(ValueError, match=r"features.*(0 to 2|layers:\[N, M\])"):
        layers_of(choice, 2)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_base_gives_the_chosen_states_from_waves_and_from_a_cache(make_model: MakeModel, choice: str) -> None:
    model = make_model(base_features=choice).eval()
    tower = model.audio_tower
    if tower.base_layers.logits is not None:
        torch.nn.init.normal_(tower.base_layers.logits)
    clips = Clips(torch.randn(2, 8_000) * 0.1, torch.tensor([8_000, 5_000]))
    with torch.no_grad():
        features, valid = tower.encode_base(clips)
        base = tower.base_encoder
        padded = clips.key(base)[1]
        inputs = base.front_end(clips.wave, clips.lengths, padded)
        states = torch.stack(chosen_layers(base, choice, inputs, clips.lengths), 1)
        kept, _ = tower.encode_base(Clips(clips.wave, torch.tensor([8_000, 5_000]), states={0: states}))
    assert features.shape[1] == base.num_frames(8_000)
    assert valid.tolist() == [base.num_frames(8_000), base.num_frames(5_000)]
    torch.testing.assert_close(kept, features)


def test_the_weights_of_the_bases_layers_learn_and_are_exported(
    make_model: MakeModel, make_batch: MakeBatch, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = make_model(
        base_features="layers:[0, 2]", weak_encoders=[WeakEncoder("h", tiny_hubert_config(), features="layers:[0,1]")]
    )
    batch = make_batch(model, [[0.5], [0.7]])
    model.train()(**batch).loss.backward()
    for logits in (model.audio_tower.base_layers.logits, model.audio_tower.pool.members[0].layer_weights):
        assert logits.shape == (2,)
        assert logits.grad.abs().max() > 0
        logits.data = torch.tensor([1.0, -1.0])
    assert parameter_parts(model)["audio_tower.base_layers.logits"] == "adapter"
    export(model.eval(), build_processor(model, tokenizer), tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_a_trained_base_freezes_the_layers_that_its_features_do_not_need(make_model: MakeModel) -> None:
    model = make_model(base_features="layer:1", train_base="full")
    trained = {name for name, p in model.audio_tower.base_encoder.named_parameters() if p.requires_grad}
    assert any("layers.0." in name for name in trained)
    assert not any("layers.1." in name for name in trained)
