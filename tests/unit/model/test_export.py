import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerBase

from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.building import (
    Lora,
    WeakEncoder,
    build_processor,
    load_model,
    untouched_parameters,
)
from mowe_ray.model.export import export, open_exported
from tests.tiny_models import (
    ENCODER_CONFIGS,
    tiny_ast_config,
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_qwen3_asr_config,
    tiny_wav2vec2_conformer_config,
    tiny_wavlm_config,
    tiny_whisper_config,
)
from tests.unit.model.conftest import MakeModel, waves

MakeBatch = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def trained(
    request: pytest.FixtureRequest, make_model: MakeModel, make_batch: MakeBatch
) -> MoweForConditionalGeneration:
    """A model with LoRA in several places, after three real steps; its parameter ties the embeddings."""
    tied = getattr(request, "param", False)
    model = make_model(
        weak_encoders=[
            WeakEncoder("whisper", tiny_whisper_config(d_model=16), "full"),
            WeakEncoder("hubert", tiny_hubert_config(), "lora", "weighted_sum"),
            WeakEncoder("wavlm", tiny_wavlm_config(), "lora"),
            WeakEncoder("ast", tiny_ast_config(), "frozen", "layer:1"),
        ],
        language_model=tiny_language_model_config("qwen2", tie_word_embeddings=tied),
        lora=Lora(r=2, alpha=8, dropout=0.1, target_modules=("q_proj", "down_proj")),
        train_base="lora",
        router_top_k=2,
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        model(**make_batch(model, [[0.5], [0.7]], seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits_of(model: MoweForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model(**batch).logits
    return logits


TIED = pytest.mark.parametrize("trained", [False, True], ids=["untied", "tied"], indirect=True)


@pytest.mark.slow
def test_no_family_is_missed_in_an_export_that_has_it(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """transformers writes AST with the names of its first checkpoints: evaluate and serve called it incomplete."""
    pool = [WeakEncoder(f"m{i}", make(), "frozen") for i, make in enumerate(ENCODER_CONFIGS.values())]
    model = make_model(weak_encoders=pool)
    export(model, build_processor(model, tokenizer), tmp_path)
    opened = open_exported(str(tmp_path))
    assert opened.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow
@TIED
def test_export_merges_lora_and_gives_the_same_logits(
    trained: MoweForConditionalGeneration,
    make_batch: MakeBatch,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    export(trained, build_processor(trained, tokenizer), tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} <= {".safetensors", ".json", ".py", ".jinja"}
    assert all(torch.equal(trained.state_dict()[name], weight) for name, weight in before.items())
    batch = make_batch(trained, [[0.5], [0.9, 0.6], []])
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert type(loaded) is MoweForConditionalGeneration
        assert not any(".lora_" in name for name in loaded.state_dict())
        torch.testing.assert_close(logits_of(loaded, batch), logits_of(trained, batch), atol=1e-5, rtol=1e-5)
    prompts = make_batch(trained, [[0.5]], answers=False)
    ours = trained.generate(**prompts, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(**prompts, max_new_tokens=4, do_sample=False), ours)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, MoweProcessor)
    assert processor.num_audio_tokens(9999) == build_processor(trained, tokenizer).num_audio_tokens(9999)


@pytest.mark.slow
def test_every_family_survives_an_export(
    make_model: MakeModel, make_batch: MakeBatch, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """With the buffers that its network computes; and the base encoder's frames are counted alike."""
    configs = [make() for make in ENCODER_CONFIGS.values()]
    configs.append(tiny_wav2vec2_conformer_config(position_embeddings_type="rotary"))
    model = make_model(
        base_encoder=tiny_qwen3_asr_config(),
        weak_encoders=[WeakEncoder(f"member{number}", config) for number, config in enumerate(configs)],
        fusion="concat",
    ).eval()
    processor = build_processor(model, tokenizer)
    export(model, processor, tmp_path)
    batch = make_batch(model, [[0.5], [2.3, 0.6]])
    loaded = MoweForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    read = MoweProcessor.from_pretrained(tmp_path)
    for samples in (400, 15_999, 16_000, 16_001, 40_000):
        wanted = model.audio_tower.token_counts([samples])[0]
        assert read.num_audio_tokens(samples) == processor.num_audio_tokens(samples) == wanted


@pytest.mark.slow
def test_exporting_a_loaded_export_is_bitwise_the_same(
    trained: MoweForConditionalGeneration,
    make_batch: MakeBatch,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    export(trained, build_processor(trained, tokenizer), tmp_path / "one")
    one = AutoModel.from_pretrained(tmp_path / "one").eval()
    export(one, AutoProcessor.from_pretrained(tmp_path / "one"), tmp_path / "two")
    two = AutoModel.from_pretrained(tmp_path / "two").eval()
    batch = make_batch(trained, [[0.5]])
    assert torch.equal(logits_of(one, batch), logits_of(two, batch))


@pytest.mark.slow
@TIED
def test_save_pretrained_keeps_adapters_apart(
    trained: MoweForConditionalGeneration, make_batch: MakeBatch, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    loaded = MoweForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    batch = make_batch(trained, [[0.5], [0.9]])
    assert torch.equal(logits_of(loaded, batch), logits_of(trained, batch))
    ours = {name for name, p in trained.named_parameters() if p.requires_grad and ".lora_" in name}
    theirs = {name for name, p in loaded.named_parameters() if p.requires_grad and ".lora_" in name}
    assert ours == theirs
    adapted = [n for n, p in loaded.named_parameters() if ".base_layer." in n and p.requires_grad]
    assert adapted == []
    frozen = [encoder.frozen for encoder in loaded.audio_tower.encoders()]
    assert frozen == [encoder.frozen for encoder in trained.audio_tower.encoders()]


@pytest.mark.slow
@TIED
def test_weights_gathered_elsewhere_are_exported(
    trained: MoweForConditionalGeneration,
    make_batch: MakeBatch,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """A sharded model's own tensors are empty; its parameters come by name, each tied one once."""
    weights = {name: p.detach().clone() for name, p in trained.named_parameters()}
    weights |= {name: b.clone() for name, b in trained.named_buffers()}
    batch = make_batch(trained, [[0.5]])
    wanted = logits_of(trained, batch)
    processor = build_processor(trained, tokenizer)
    export(trained.to(torch.device("meta")), processor, tmp_path, state_dict=weights)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded, batch), wanted, atol=1e-5, rtol=1e-5)


_ELSEWHERE = """
import sys
sys.modules["mowe_ray"] = None  # as where it is not installed: importing it fails
import numpy as np, torch
from transformers import AutoModel, AutoProcessor
folder, out = sys.argv[1:]
# Trusted because this test has just written the code in the folder; that it runs is what is tested.
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
wave = np.load(folder + "/wave.npy")
with torch.no_grad():
    logits = model(**processor(["What?"], [[wave]], ["yes"])).logits
new = model.generate(**processor(["What?"], [[wave]]), max_new_tokens=3, do_sample=False)
assert new.shape[0] == 1
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"ray", "deepspeed", "peft"}, loaded & {"ray", "deepspeed", "peft"}
torch.save(logits, out)
"""


@pytest.mark.slow
def test_plain_transformers_loads_the_export_with_the_users_consent(
    trained: MoweForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    processor = build_processor(trained, tokenizer)
    export(trained, processor, folder)
    (wave,) = waves(0.7)
    np.save(folder / "wave.npy", wave)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(folder), str(tmp_path / "logits.pt")],
        env=environment,
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    wanted = logits_of(trained, dict(processor(["What?"], [[wave]], ["yes"])))
    got = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_export_can_be_trained_further(
    trained: MoweForConditionalGeneration,
    make_batch: MakeBatch,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    export(trained, build_processor(trained, tokenizer), tmp_path)
    batch = make_batch(trained, [[0.5], [0.7]])
    model = load_model(
        str(tmp_path),
        train_weak={"ast": "full", "hubert": "lora"},
        lora=Lora(r=2),
        router_temperature=2.0,
        spec_augment={"mask_prob": 0.1, "mask_length": 5},
    )
    states = [encoder.frozen for encoder in model.audio_tower.encoders()]
    assert states == [True, True, False, True, False]
    assert model.config.router_temperature == 2.0
    model.config.router_temperature = trained.config.router_temperature
    torch.testing.assert_close(logits_of(model.eval(), batch), logits_of(trained, batch), atol=1e-5, rtol=1e-5)
    model.train()(**batch).loss.backward()
    assert untouched_parameters(model) == []


@pytest.mark.slow
def test_unmerged_checkpoint_can_be_trained_further(
    trained: MoweForConditionalGeneration, make_batch: MakeBatch, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), lora=None)
    assert model.config.lora == {}
    assert not any(".lora_" in name for name in model.state_dict())
    batch = make_batch(trained, [[0.5]])
    torch.testing.assert_close(logits_of(model.eval(), batch), logits_of(trained, batch), atol=1e-5, rtol=1e-5)


def test_unknown_member_is_refused(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = make_model()
    export(model, build_processor(model, tokenizer), tmp_path)
    with pytest.raises(ValueError, match="beats"):
        load_model(str(tmp_path), train_weak={"beats": "full"})
    with pytest.raises(TypeError, match="adapter"):
        load_model(str(tmp_path), adapter="qformer")
