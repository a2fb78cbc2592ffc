"""Checks over several keys, warnings, and what a configuration promises."""

import pytest
from pydantic import ValidationError

from mowe_ray.config import ConfigError, RunConfig, load_config
from mowe_ray.config.schema import TrackingSection

POOL = "model.weak_encoders=[{name: a, checkpoint: x/tiny}, {name: b, checkpoint: x/tiny}]"


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", overrides)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([POOL, "model.router.top_k=3"], "model.router.top_k"),
        (
            ["model.router.data_dependent=false", "model.router.data_independent=false"],
            "model.router.data_dependent",
        ),
        ([POOL, "model.weak_encoders.1.name=a"], "model.weak_encoders"),
        (["model.weak_encoders.0.train=lora"], "model.weak_encoders.0.train"),
        (["model.train_base=lora"], "model.train_base"),
        (["model.weak_encoders.0.features=layer"], "model.weak_encoders.0.features"),
        (["model.weak_encoders.0.name=a.b"], "model.weak_encoders.0.name"),
        (["data.min_duration_s=12"], "data.min_duration_s"),
        (["data.batch_seconds=11.9"], "data.batch_seconds"),
        (["data.train.0.path=builtin:test"], "data.train.0.path"),
        (["data.train.0.weight=0"], "data.train.0.weight"),
        (["data.validation.1.path=x", "data.validation.1.name=builtin"], "data.validation"),
        (["compute.offload=cpu", "compute.zero_stage=0"], "compute.offload"),
        (["compute.zero_stage=4"], "compute.zero_stage"),
        (["training.learning_rate=.nan"], "training.learning_rate"),
        (["seed=-1"], "seed"),
        (["name="], "name"),
    ],
)
def test_refused(overrides: list[str], key: str) -> None:
    assert problem(*overrides).startswith(f"{key}: ")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.weak_encoders=[]"],  # the baseline without a pool
        ["model.weak_encoders=[]", "model.router.top_k=4"],
        ["model.fusion=average", "model.router.top_k=9"],  # no router is used
        ["model.router.data_dependent=false"],
        ["model.weak_encoders.0.features=layer:0"],
        ["model.train_base=lora", "model.lora.r=4"],
        ["compute.offload=cpu", "compute.zero_stage=1"],
        ["data.batch_seconds=12"],
    ],
)
def test_accepted(overrides: list[str]) -> None:
    load_config("quickstart", overrides)


def test_config_is_frozen() -> None:
    config = load_config("quickstart")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.model.router.top_k = 2


def test_only_identical_frozen_members_are_warned_about() -> None:
    def warnings(*overrides: str) -> list[str]:
        return load_config("quickstart", [POOL, *overrides]).warnings()

    assert warnings() == ["model.weak_encoders.1.train: b is a frozen copy of a and adds no information"]
    assert warnings("model.weak_encoders.1.train=full") == []
    assert warnings("model.weak_encoders.1.features=layer:1") == []
    assert warnings("model.weak_encoders.1.checkpoint=x/base") == []


def test_frozen_random_weights_are_warned_about() -> None:
    config = load_config("quickstart", ["model.train_base=frozen", "model.weak_encoders.2.train=frozen"])
    assert [line.partition(":")[0] for line in config.warnings()] == [
        "model.weak_encoders.2.train",
        "model.train_base",
    ]


def test_checkpointing_what_does_not_train_is_warned_about() -> None:
    def warnings(*overrides: str) -> list[str]:
        parts = "model.gradient_checkpointing=[base_encoder, weak_encoders, language_model]"
        found = load_config("quickstart", [parts, *overrides]).warnings()
        return [line for line in found if line.startswith("model.gradient_checkpointing: ")]

    key, why = "model.gradient_checkpointing: ", ", so there are no activations to save"
    assert warnings() == []
    assert warnings("model.train_base=frozen") == [f"{key}base_encoder is frozen{why}"]
    frozen = "model.weak_encoders=[{name: a, checkpoint: x/tiny}]"
    assert warnings(frozen) == [f"{key}weak_encoders are all frozen{why}"]
    assert warnings(frozen, "model.weak_encoders.0.train=lora", "model.lora.r=4") == []
    assert warnings("model.weak_encoders=[]") == [f"{key}weak_encoders are none{why}"]


def test_checkpointing_names_parts() -> None:
    assert load_config("paper").model.gradient_checkpointing == ["language_model"]
    key = "model.gradient_checkpointing"
    assert problem(f"{key}=true") == f"{key}: must be a valid list, got True"
    assert problem(f"{key}=[adapter]").startswith(f"{key}.0: ")


def test_warm_up_longer_than_training_is_warned_about() -> None:
    config = load_config("quickstart", ["training.max_steps=5", "training.warmup_steps=5"])
    assert [line.partition(":")[0] for line in config.warnings()] == ["training.warmup_steps"]


def test_paper_needs_data_only_when_it_runs() -> None:
    config = load_config("paper")
    with pytest.raises(ConfigError, match=r"^data\.train: no training data"):
        config.require_data()
    load_config("paper", ["data.train.0.path=/shards"]).require_data()


def test_every_field_says_what_it_does() -> None:
    from mowe_ray.config.keys import known_keys

    for key in known_keys().values():
        documentation = key.section.__doc__ if key.section else key.field.description
        assert documentation, key.path
        assert documentation.endswith("."), key.path
        assert "\n" not in documentation, key.path
    assert RunConfig.__doc__


def test_a_tracker_that_needs_a_key_says_so_before_the_start(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    keys = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(keys))
    tracking = TrackingSection.model_validate({"wandb": {"mode": "online"}})
    with pytest.raises(ConfigError, match=r"^tracking\.wandb\.mode: .*WANDB_API_KEY"):
        tracking.require()
    assert TrackingSection.model_validate({"wandb": {"mode": "offline"}}).missing() == []
    keys.write_text("machine other.host login user password x\n")
    keys.chmod(0o600)
    assert len(tracking.missing()) == 1
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.host:8080")
    assert tracking.missing() == []
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking.missing() == []
