"""Decisions about a run as values: restart or give up, claim a folder, resize, without a cluster."""

from typing import Any

import pytest

from mowe_ray.config import RunConfig, load_config
from mowe_ray.distributed.ray_train.driver import Claim, covers, decide_claim, first_difference
from mowe_ray.distributed.ray_train.worker_group import backend, scaling
from mowe_ray.training.fault_tolerance.restart_policy import RestartDecision, RestartPolicy

RETRY, GIVE_UP = RestartDecision.RETRY, RestartDecision.GIVE_UP


def configured(*overrides: str) -> RunConfig:
    return load_config("quickstart", [*overrides])


# ---- restart or give up -----------------------------------------------------------------------


def decisions(max_failures: int, progressed: list[bool]) -> list[RestartDecision]:
    policy, found = RestartPolicy(max_failures), []
    for made_progress in progressed:
        policy = policy.after_failure(progressed=made_progress)
        found.append(policy.decision)
    return found


def test_failures_without_progress_are_limited() -> None:
    assert decisions(2, [False] * 3) == [RETRY, RETRY, GIVE_UP]
    assert decisions(0, [False]) == [GIVE_UP]


def test_progress_forgives_earlier_failures() -> None:
    assert decisions(2, [False, False, True, False, False]) == [RETRY, RETRY, RETRY, RETRY, GIVE_UP]
    assert decisions(1, [True] * 50) == [RETRY] * 50


def test_without_restarts_progress_does_not_help() -> None:
    assert decisions(0, [True]) == [GIVE_UP]


def test_a_group_that_ray_restarted_in_vain_is_given_up_unless_it_progressed() -> None:
    policy = RestartPolicy(3)
    assert policy.after_failure(progressed=False, attempts=4).decision is GIVE_UP
    after = policy.after_failure(progressed=True, attempts=4)
    assert (after.failures, after.decision) == (1, RETRY)


# ---- claim of a folder ------------------------------------------------------------------------


def stored(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def test_an_empty_folder_is_taken_and_ones_own_is_resumed() -> None:
    config = configured()
    assert decide_claim(None, config) == Claim(resumes=False)
    assert decide_claim(stored(config), config) == Claim(resumes=True)


def test_an_existing_folder_is_refused_if_that_is_asked_for() -> None:
    claim = decide_claim(stored(configured()), configured("resume=false"))
    assert claim.refusal == "exists and resume=false: choose another name"


@pytest.mark.parametrize(
    "override",
    [
        *("training.max_steps=7", "training.async_validation=true", "compute.num_workers=3", "data.decode_cpus=2"),
        *("data.batch_seconds=33.0", "training.save_every=3", "compute.max_failures=9", "tracking.tensorboard=true"),
    ],
)
def test_what_does_not_change_the_experiment_may_change(override: str) -> None:
    config = configured(override)
    assert stored(config) != stored(configured())
    assert decide_claim(stored(configured()), config) == Claim(resumes=True)


def test_training_data_may_have_moved_but_not_changed_their_weight() -> None:
    before = stored(configured("data.train=[{path: a, weight: 2}, {path: b}]"))
    assert decide_claim(before, configured("data.train=[{path: c, weight: 2}, {path: d}]")) == Claim(resumes=True)
    for other in ("[{path: a}, {path: b}]", "[{path: a, weight: 2}]", "[{path: a, weight: 2, task: asr}, {path: b}]"):
        assert "another data.train" in str(decide_claim(before, configured(f"data.train={other}")).refusal)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=5", "seed"),
        ("training.learning_rate=0.123", "training.learning_rate"),
        ("compute.zero_stage=3", "compute.zero_stage"),
        ("model.pad_audio=full30", "model.pad_audio"),
        ("data.max_duration_s=3.0", "data.max_duration_s"),
    ],
)
def test_another_experiment_is_refused_and_its_key_named(override: str, key: str) -> None:
    claim = decide_claim(stored(configured()), configured(override))
    assert not claim.resumes
    assert claim.refusal == f"holds a run with another {key}: choose another name, or go back to its value"


def test_keys_that_came_later_than_the_run_have_their_defaults() -> None:
    config, old = configured(), stored(configured())
    del old["training"]["max_skipped_steps"], old["compute"]["offload"]
    assert decide_claim(old, config) == Claim(resumes=True)
    assert decide_claim(old, configured("compute.offload=cpu", "compute.zero_stage=2")).resumes is False


def test_a_run_of_another_version_names_the_first_key_that_differs() -> None:
    old = stored(configured())
    old["training"]["eval_beside"] = True  # a key that this version does not know
    assert decide_claim(old, configured()) == Claim(resumes=True)
    assert first_difference({**old, "seed": 1}, stored(configured())) == "seed"


def test_a_finished_run_covers_a_request_that_is_not_longer() -> None:
    steps = configured("training.max_steps=10")
    assert covers({"steps": 10, "epochs": 1}, steps)
    assert not covers({"steps": 9, "epochs": 1}, steps)
    epochs = configured("training.epochs=2")
    assert covers({"steps": 1, "epochs": 2}, epochs)
    assert not covers({"steps": 99, "epochs": 1}, epochs)


# ---- size of the group ------------------------------------------------------------------------


def test_an_elastic_group_is_resized_between_its_limits_and_the_global_batch_stays() -> None:
    config = configured("compute.num_workers=[2,8]", "compute.resize_interval_s=12", "training.gradient_accumulation=3")
    placed = scaling(config, (config.compute.min_workers, config.compute.max_workers))
    assert (placed.num_workers, placed.elastic_resize_monitor_interval_s) == ((2, 8), 12)
    assert config.micro_batches_per_step == 24


def test_workers_are_placed_with_their_bundle() -> None:
    config = configured("compute.gpus_per_worker=1", "compute.accelerator_type=H100", "data.decode_cpus=4")
    placed = scaling(config, 2)
    assert (placed.num_workers, placed.use_gpu, placed.accelerator_type) == (2, True, "H100")
    assert placed.resources_per_worker == {"CPU": config.compute.cpus_per_worker, "GPU": 1}
    assert (backend(config, 60).backend, backend(configured(), 60).backend) == ("nccl", "gloo")
