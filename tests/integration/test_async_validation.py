"""Async validation: the same numbers as in the workers, while steps go on, whatever happens to it."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from mowe_ray.distributed.ray_train.coordinator import start_coordinator
from mowe_ray.distributed.ray_train.driver import train
from tests.tiny_runs import Corpus, assert_same_run, records, tiny_config

SETTINGS = (
    *("training.async_validation=true", "compute.num_workers=2", "training.max_steps=6", "training.eval_every=3"),
    "training.log_samples=true",
)
# Of six CPUs: two workers take all, as each has two to decode.
NO_ROOM = "data.decode_cpus=2"

# They wait for what the machine has free.
pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def inside(ray_cluster: None, tiny_corpus: Corpus, storage: Path) -> dict[str, Any]:
    """The result of a run whose workers have to stop to validate, and what it said."""
    said: list[str] = []
    return train(tiny_config(tiny_corpus, storage, "inside", *SETTINGS, NO_ROOM), said.append) | {"said": said}


def _assert_same_validations(
    result: dict[str, Any], expected: dict[str, Any], *, missing: tuple[int, ...] = ()
) -> None:
    found = sorted(records(result["run"], "validation"), key=lambda record: record["step"])
    wanted = [record for record in records(expected["run"], "validation") if record["step"] not in missing]
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["tasks"] == other["tasks"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert not (Path(result["run"]) / "validating").exists()


def _order(result: dict[str, Any]) -> list[str]:
    lines = map(json.loads, (Path(result["run"]) / "metrics.jsonl").read_text().splitlines())
    return [f"{line['kind']} {line['step']}" for line in lines if line["kind"] in ("train", "validation")]


def _steps(*steps: int) -> list[str]:
    return [f"train {step}" for step in steps]


def test_without_free_cpus_the_workers_stop_for_it(inside: dict[str, Any]) -> None:
    assert _order(inside) == [*_steps(1, 2, 3), "validation 3", *_steps(4, 5, 6), "validation 6"]
    assert sum("no node has 3 CPUs to spare: workers stop to validate" in line for line in inside["said"]) == 1
    assert not (Path(inside["run"]) / "validating").exists()


def test_it_has_the_numbers_of_the_workers_while_they_train_on(
    tiny_corpus: Corpus, storage: Path, inside: dict[str, Any]
) -> None:
    said: list[str] = []
    result = train(tiny_config(tiny_corpus, storage, "beside", *SETTINGS), said.append)
    assert _order(result) == [*_steps(1, 2, 3, 4, 5, 6), "validation 3", "validation 6"]
    _assert_same_validations(result, inside)
    assert_same_run(result, inside)
    assert sum(line.startswith("validation held_out at step 3: loss") for line in said) == 1
    assert not [line for line in said if "async validation" in line or "to spare" in line]


class _Run:
    """A run in a thread, to disturb."""

    def __init__(self, *arguments: Any):
        self.coordinator, self.said = start_coordinator(), list[str]()
        self.results: list[dict[str, Any]] = []
        self._thread = threading.Thread(
            target=lambda: self.results.append(train(tiny_config(*arguments), self.said.append, self.coordinator))
        )
        self._thread.start()

    def until_step(self, step: int) -> None:
        while not any(line.startswith(f"step {step}/") for line in self.said):
            assert self._thread.is_alive(), self.said
            time.sleep(0.01)

    def result(self) -> dict[str, Any]:
        self._thread.join(120)
        return self.results[0]


def _validators() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::_Validator"):  # Ray's title of an actor
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_a_killed_one_costs_that_validation_alone(tiny_corpus: Corpus, storage: Path, inside: dict[str, Any]) -> None:
    run = _Run(tiny_corpus, storage, "killed", *SETTINGS)
    run.until_step(3)
    while not (validators := _validators()):
        time.sleep(0.01)
    for process in validators:
        process.kill()
    result = run.result()
    assert_same_run(result, inside)
    _assert_same_validations(result, inside, missing=(3,))
    assert sum("the async validation of step 3 failed" in line for line in run.said) == 1


def test_one_that_is_broken_off_with_its_run_is_made_up_for(
    tiny_corpus: Corpus, storage: Path, inside: dict[str, Any]
) -> None:
    settings = (*SETTINGS, f"data.feature_cache={storage}/cache")
    run = _Run(tiny_corpus, storage, "stopped", *settings)
    run.until_step(4)
    run.coordinator.stop.remote()
    stopped = run.result()
    assert stopped["stopped_at_step"] in (4, 5)
    assert (storage / "stopped" / "validating" / "step-00000003" / "pending.json").exists()
    assert records(stopped["run"], "validation") == []
    result = train(tiny_config(tiny_corpus, storage, "stopped", *settings), [].append)
    _assert_same_validations(result, inside)
    assert_same_run(result, inside)
