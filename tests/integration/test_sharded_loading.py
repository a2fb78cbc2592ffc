"""A pretrained language model loads as shards under ZeRO-3: the same weights and training, in less memory."""

import gc
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mowe_ray.config.model_section import ModelSection
from mowe_ray.config.training_section import MoweLossSection, TrainingSection
from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine, deepspeed_config, sharded_loading
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.building import equal_members, strong_members
from mowe_ray.model.export import export
from mowe_ray.training import build as assembling
from tests.ranks import curve, micro_batch, optimizer_groups, plain_engine, run_ranks, train
from tests.tiny_models import (
    save_language_model,
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_whisper_config,
)

pytestmark = pytest.mark.slow

TOLERANCE = 5e-6  # see test_zero_equality
PLAN = [[[0, 0], [1], [None], [1, 2]], [[2], [0, 1], [1], [0]]]
BATCHES = [
    [micro_batch(rows, seed=100 * step + 10 * lane) for lane, rows in enumerate(lanes)]
    for step, lanes in enumerate(PLAN)
]
VARIANTS = ("lora", "full", "offload", "export")


def _section(folder: Path, variant: str) -> ModelSection:
    """`lora` also needs a row of embeddings for the audio token; `full` has tied embeddings."""
    quiet = dict.fromkeys((f"{name}_dropout" for name in ("hidden", "attention", "activation", "feat_proj")), 0.0)
    values: dict[str, Any] = {
        "base_encoder": {"config": tiny_whisper_config()},
        "weak_encoders": [
            {"name": "w", "checkpoint": {"config": tiny_whisper_config(d_model=16)}, "train": "full"},
            {"name": "h", "checkpoint": {"config": tiny_hubert_config(**quiet)}, "train": "full"},
        ],
        "language_model": str(folder / ("tied" if variant == "full" else "untied")),
        "lora": None if variant == "full" else {"r": 4, "alpha": 8},
        "init_from": str(folder / "export") if variant == "export" else None,
    }
    return ModelSection.model_validate(values)


def _assemble(section: ModelSection, loading: Any = None) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    tokenizer = assembling.tokenizer_of(section, None)
    return assembling.assemble(section, MoweLossSection(), seed=3, tokenizer=tokenizer, gpu=False, loading=loading)


def _groups(model: MoweForConditionalGeneration) -> list[tuple[str, float, int]]:
    groups = assembling.optimizer_groups(model, TrainingSection(max_steps=1))
    return [(group["part"], group["weight_decay"], len(group["params"])) for group in groups]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_language_model(folder / "untied", "llama", vocab_size=len(tiny_tokenizer(chat_template=True)))
    save_language_model(folder / "tied", "qwen2", tie_word_embeddings=True, seed=1)
    model, processor = _assemble(_section(folder, "lora"))
    export(model, processor, folder / "export")
    return folder


# ---- what the ranks do ------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What one rank hands back of one variant; shards and shapes are those of the language model."""

    shards: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    unsharded: dict[str, torch.Tensor]
    warnings: list[str]
    groups: list[tuple[str, float, int]]
    generator: torch.Tensor
    curve: dict[str, list[float]]
    weights: dict[str, torch.Tensor]
    untouched: list[str]


def _load_and_train(folder: Path) -> dict[str, Loaded]:
    return {variant: _one_variant(_section(folder, variant), variant) for variant in VARIANTS}


def _one_variant(section: ModelSection, variant: str) -> Loaded:
    offload: Any = "cpu" if variant == "offload" else "none"
    config = deepspeed_config(zero_stage=3, clip_norm=0.4, bf16=False, offload=offload)
    torch.manual_seed(11)
    model, processor = _assemble(section, sharded_loading(config))
    parameters = dict(model.named_parameters())
    sharded = {name: p for name, p in parameters.items() if hasattr(p, "ds_id")}
    assert all(p.numel() == 0 for p in sharded.values())
    facts = (
        {name: p.ds_tensor.clone() for name, p in sharded.items()},
        {name: tuple(p.ds_shape) for name, p in sharded.items()},
        {name: p.detach().clone() for name, p in parameters.items() if name not in sharded},
        [*equal_members(model), *strong_members(model)],
        _groups(model),
        torch.get_rng_state(),
    )
    engine = DeepSpeedEngine(model.train(), optimizer_groups(model), config)
    results = train(engine, processor, BATCHES)
    return Loaded(*facts, curve(results), engine.full_state_dict(), engine.untouched_parameters())


# ---- the tests --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Loaded]]:
    """What the two ranks returned, by variant."""
    return run_ranks(_load_and_train, folder, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_shards_are_the_checkpoint(ranks: list[dict[str, Loaded]], folder: Path, variant: str) -> None:
    torch.manual_seed(11)
    model, _ = _assemble(_section(folder, variant))
    first, second = (rank[variant] for rank in ranks)
    expected = dict(model.named_parameters())
    assert list(first.shards) == list(second.shards)
    for name, shape in first.shapes.items():
        joined = torch.cat([first.shards[name].flatten(), second.shards[name].flatten()])
        assert torch.equal(joined[: expected[name].numel()].view(shape), expected[name]), name
    for rank in (first, second):
        assert rank.unsharded.keys() | rank.shards.keys() == expected.keys()
        for name, weight in rank.unsharded.items():
            assert torch.equal(weight, expected[name]), name
        assert rank.warnings == [*equal_members(model), *strong_members(model)]
        assert rank.groups == _groups(model)
        assert torch.equal(rank.generator, torch.get_rng_state())


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_of_the_checkpoint_is_sharded(ranks: list[dict[str, Loaded]], variant: str) -> None:
    whole = [name for name in ranks[0][variant].unsharded if name.startswith("language_model.") and "lora" not in name]
    # An embedding that gained a row is a new one, whole until the engine shards it.
    grown = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    assert whole == (grown if variant in ("lora", "offload") else [])
    assert not any(name.startswith("audio_tower.") for name in ranks[0][variant].shards)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_that_of_one_process(ranks: list[dict[str, Loaded]], folder: Path, variant: str) -> None:
    model, processor = _assemble(_section(folder, variant))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    expected = curve(train(plain_engine(model.train()), processor, BATCHES))
    first, second = (rank[variant] for rank in ranks)
    assert (first.untouched, second.untouched) == ([], [])
    assert first.curve == second.curve
    for name, values in expected.items():
        assert first.curve[name] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), name
    assert first.weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(first.weights[name], weight, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    trained = [name for name in start if name.startswith("language_model.")]
    assert trained
    assert not any(torch.equal(first.weights[name], start[name]) for name in trained)


# ---- memory -----------------------------------------------------------------------------------


class AnonymousMemory:
    """Highest rise of this process's anonymous memory inside the context, in bytes.

    Pages of the checkpoint's file do not count: rank 0 maps it, and the kernel may drop them at any time. So the
    kernel's own high-water mark (VmHWM), which counts them, would say nothing about what the process needs.
    """

    def __enter__(self) -> "AnonymousMemory":
        gc.collect()
        self._start = self._peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.rise = self._peak - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.0005):
            self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024


def _peaks(small: Path, large: Path) -> dict[str, int]:
    """Load and shard the large checkpoint both ways, after a small one that imports and compiles what there is to."""
    config = deepspeed_config(zero_stage=3, clip_norm=1.0, bf16=False, offload="none")
    peaks = {}
    for way in ("whole", "sharded"):
        for folder in (small, large):
            section = ModelSection(base_encoder={"config": tiny_whisper_config()}, language_model=str(folder))
            with AnonymousMemory() as memory:
                model, _ = _assemble(section, sharded_loading(config) if way == "sharded" else None)
                engine = DeepSpeedEngine(model, optimizer_groups(model), config)
            del model, engine
        peaks[way] = memory.rise
    return peaks


def test_no_rank_ever_holds_the_whole_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # malloc keeps what is freed between the shards; so, what is freed leaves the process at once.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    config = tiny_language_model_config("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "large")
    tiny_tokenizer(chat_template=True).save_pretrained(tmp_path / "large")
    peaks = run_ranks(_peaks, folder / "untied", tmp_path / "large", folder=tmp_path / "ranks", method="spawn")
    shares = {way: [round(rank[way] / size, 2) for rank in peaks] for way in ("whole", "sharded")}
    print(f"model of {size / 2**20:.0f} MiB; peak / size on both ranks: {shares}")
    # Half of the model, and two copies of its largest tensor (a twelfth) while that one is handed out.
    assert max(shares["sharded"]) < 0.9
    assert max(shares["whole"]) > 1.3
