"""Layers, overrides and the wording of errors."""

import json
from pathlib import Path

import pytest

from mowe_ray.config import ConfigError, RunConfig, load_config, preset_names
from mowe_ray.config.load import parse_yaml

MINIMAL = """
model: {base_encoder: openai/whisper-small, language_model: some/llm}
training: {max_steps: 10}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def problems(source: str | Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: paper\ntraining: {weight_decay: 0.5, clip_norm: 2}\n")
    config = load_config(file, ["training.clip_norm=3"])
    assert config.compute.max_failures == RunConfig.model_fields["compute"].default.max_failures
    assert config.training.warmup_steps == 3000  # preset over default
    assert config.training.weight_decay == 0.5  # file over preset
    assert config.training.clip_norm == 3  # override over file


def test_sections_merge_but_lists_and_inline_configs_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: quickstart\n"
        "model:\n"
        "  base_encoder: {config: {model_type: hubert}}\n"
        "  weak_encoders: [{name: only, checkpoint: some/encoder}]\n"
    )
    model = load_config(file).model
    assert model.base_encoder.model_dump() == {"config": {"model_type": "hubert"}}
    assert [member.name for member in model.weak_encoders] == ["only"]
    assert model.adapter.downsample == 8


def test_resolved_config_loads_again_unchanged(tmp_path: Path) -> None:
    for name in preset_names():
        config = load_config(name, ["training.learning_rate=1e-7"])
        file = tmp_path / f"{name}.json"
        file.write_text(config.model_dump_json(indent=2))
        assert load_config(file) == config
        json.loads(file.read_text())


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.e-4", "'1e-4'"])
def test_scientific_notation_is_a_number(minimal: Path, written: str) -> None:
    assert load_config(minimal, [f"training.learning_rate={written}"]).training.learning_rate == 1e-4
    minimal.write_text(MINIMAL.replace("max_steps: 10", f"max_steps: 10, learning_rate: {written}"))
    assert load_config(minimal).training.learning_rate == 1e-4


def test_numbers_inside_inline_configs_stay_numbers(minimal: Path) -> None:
    config = load_config(
        minimal,
        ["model.base_encoder={config: {model_type: whisper, d_model: 64, init_std: 2e-2}}"],
    )
    assert config.model.base_encoder.config == {
        "model_type": "whisper",
        "d_model": 64,
        "init_std": 0.02,
    }


def test_off_is_a_word_and_a_switch(minimal: Path) -> None:
    config = load_config(minimal, ["tracking.wandb.mode=off", "resume=off"])
    assert (config.tracking.wandb.mode, config.resume) == ("off", False)


@pytest.mark.parametrize("name", ["42", "007", "12e5", "2026-01-31", "no", "true"])
def test_names_stay_as_typed(minimal: Path, name: str) -> None:
    config = load_config(minimal, [f"name={name}", f"tracking.wandb.group={name}"])
    assert (config.name, config.tracking.wandb.group) == (name, name)


def test_overrides_reach_into_lists_and_inline_configs() -> None:
    config = load_config(
        "quickstart",
        [
            "model.weak_encoders.0.train=frozen",
            "model.base_encoder.config.d_model=32",
            "data.train.1.path=/more",
            "data.train.1.weight=0.5",
            "model.lora.r=4",
        ],
    )
    assert config.model.weak_encoders[0].train == "frozen"
    assert config.model.base_encoder.config["d_model"] == 32
    assert [source.path for source in config.data.train] == ["builtin:train", "/more"]
    assert config.model.lora is not None
    assert config.model.lora.r == 4


def test_whole_list_override() -> None:
    config = load_config("quickstart", ["data.train=[{path: a}, {path: b, weight: 2}]"])
    assert [(source.path, source.weight) for source in config.data.train] == [("a", 1), ("b", 2)]


def test_a_later_length_replaces_an_earlier_one(minimal: Path) -> None:
    assert load_config("paper", ["training.max_steps=5"]).training.epochs is None
    assert load_config(minimal, ["training.epochs=2"]).training.max_steps is None
    assert "not both" in problems(minimal, "training.epochs=2", "training.max_steps=5")[0]
    assert problems(minimal, "training.max_steps=null") == ["training.max_steps: give max_steps or epochs"]


def test_overrides_do_not_leak_between_loads() -> None:
    load_config("quickstart", ["data.train.0.path=/other"])
    assert load_config("quickstart").data.train[0].path == "builtin:train"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("training.learning_rat", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("model.learning_rate", "training.learning_rate"),
        ("train.learning_rate", "training.learning_rate"),
        ("top_k", "model.router.top_k"),
        ("model.topk", "model.router.top_k"),
        ("num_worker", "compute.num_workers"),
        ("data.train.3.pth", "data.train.3.path"),
        ("model.encoders.2.features", "model.weak_encoders.2.features"),
        ("tracking.wandb_mode", "tracking.wandb.mode"),
    ],
)
def test_unknown_keys_name_the_nearest(minimal: Path, typed: str, meant: str) -> None:
    assert problems(minimal, f"{typed}=1") == [f"{typed}: unknown key (did you mean {meant}?)"]


def test_unknown_key_in_a_file(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "compute: {num_gpus: 2, zerostage: 1}\n")
    assert problems(minimal) == [
        "compute.num_gpus: unknown key (did you mean compute.num_workers?)",
        "compute.zerostage: unknown key (did you mean compute.zero_stage?)",
    ]


def test_all_problems_come_at_once() -> None:
    found = problems(
        "quickstart",
        "nonsense",
        "lorning_rate=1",
        "model.train_base=melted",
        "model.router.top_k=0",
        "data.train.9.path=x",
        "data.batch_seconds=1",
        "training.warmup_steps=ten",
        "compute.offload=cpu",
        "compute.zero_stage=0",
        "name=a/b",
        "data.validation=[",
    )
    assert sorted(line.partition(":")[0] for line in found) == [
        "compute.offload",
        "data.batch_seconds",
        "data.train.9.path",
        "data.validation",
        "lorning_rate",
        "model.router.top_k",
        "model.train_base",
        "name",
        "nonsense",
        "training.warmup_steps",
    ]
    assert "model.train_base: must be 'frozen', 'full' or 'lora', got 'melted'" in found
    assert "data.train.9.path: no position 9, the next free one is 1" in found


def test_union_tags_stay_out_of_keys(minimal: Path) -> None:
    assert problems(minimal, "model.base_encoder={config: {d_model: 3}}") == [
        "model.base_encoder: config needs a model_type, such as whisper or llama"
    ]
    assert problems(minimal, "model.lora.target_modules=[[q]]")[0].startswith(
        "model.lora.target_modules.0: must be a valid string"
    )


def test_defaults_alone_say_what_is_required() -> None:
    assert [line.partition(":")[0] for line in problems(None)] == [
        "model.base_encoder",
        "model.language_model",
        "training.max_steps",
    ]


def test_bad_files(tmp_path: Path) -> None:
    assert "neither a file nor a preset" in problems("quickstrat")[0]
    bad = tmp_path / "bad.yaml"
    for text, message in [
        ("a: [", "is not valid YAML"),
        ("- a", "must be a mapping"),
        ("preset: nope", "unknown preset 'nope'"),
        ("a: !!python/object:os.system {}", "is not valid YAML"),
        ("name: a\ntraining: {epochs: 1}\nname: b", "the key 'name' is given twice"),
        ("training:\n  epochs: 1\n  epochs: 2", "the key 'epochs' is given twice"),
        ("model: 3", "model: must be a mapping of keys, got 3"),
        ("training:", "training: must be a mapping of keys, got None"),
        ("preset: paper\nmodel: {lora: yes}", "model.lora: must be a mapping of keys, got 'yes'"),
    ]:
        bad.write_text(text)
        assert message in "\n".join(problems(bad))


def test_a_key_may_replace_a_merged_one() -> None:
    tree = parse_yaml("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}", "made")
    assert tree == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}, "c": {"x": 3, "y": 1}}
