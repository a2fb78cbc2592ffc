"""Forty trials, eight runs on one cluster, storage that goes away, kills wherever they hit: all of it is soak."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from tests.end_to_end import run_command
from tests.faults import RunningCommand, RunningSweep, ended
from tests.ray_nodes import ray_nodes
from tests.tiny_runs import REFERENCE, Corpus, assert_same_run, exported_weights, records, tiny_arguments
from tests.tiny_sweeps import run_here, trials_in, write_sweep

pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(3600)]

ALONE = [*REFERENCE, "compute.num_workers=1"]


def test_forty_trials(ray_cluster: None, tiny_corpus: Corpus, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space={"training.clip_norm": {"choice": [1.0 + number / 10 for number in range(40)]}},
        set={"training.max_steps": 2, "training.eval_every": 2},
        resources={"concurrent": 3},
    )
    began = time.monotonic()
    study = run_here(sweep)
    print(f"\n40 trials in {time.monotonic() - began:.0f} s")
    assert [trial.status for trial in study.trials.values()] == ["finished"] * 40
    folder = tmp_path / "runs/study"
    assert len((folder / "results.csv").read_text().splitlines()) == 41
    assert (folder / "report.html").stat().st_size < 5e6


def test_eight_runs_at_once_on_one_cluster(tiny_corpus: Corpus, tmp_path: Path) -> None:
    with ray_nodes() as nodes, ThreadPoolExecutor(8) as threads:
        nodes.add(16)
        runs = [
            threads.submit(
                run_command,
                *tiny_arguments(tiny_corpus, tmp_path, f"run-{number}"),
                *ALONE,
                environment={"RAY_ADDRESS": nodes.address},
                timeout_s=1800,
            )
            for number in range(8)
        ]
        for run in runs:
            finished = run.result()
            assert finished.code == 0, finished.err
            assert "workers failed" not in finished.err
            assert_same_run(finished.result, runs[0].result().result)


@pytest.fixture
def lost_disk(disk: Path) -> Iterator[Path]:
    yield disk
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def test_storage_that_becomes_read_only_ends_the_run_and_the_same_command_continues(
    tiny_corpus: Corpus, lost_disk: Path, reference: dict[str, Any]
) -> None:
    with ended(RunningCommand(tiny_corpus, lost_disk, "readonly", *REFERENCE)) as command:
        command.until(lambda: 4 in command.checkpoints(), "first checkpoint")
        subprocess.run(["mount", "-o", "remount,ro", str(lost_disk)], check=True)
        stopped = command.wait()
    assert stopped.code == 1, stopped.err
    assert "Read-only file system" in stopped.result["error"]
    assert "Traceback" not in stopped.err
    subprocess.run(["mount", "-o", "remount,rw", str(lost_disk)], check=True)
    finished = run_command(*tiny_arguments(tiny_corpus, lost_disk, "readonly"), *REFERENCE)
    assert finished.code == 0, finished.err
    assert "continuing after step" in finished.err
    assert_same_run(finished.result, reference)


def test_a_run_whose_folder_is_removed_ends_with_a_model(tiny_corpus: Corpus, tmp_path: Path) -> None:
    settings = (*REFERENCE, "training.log_samples=false", "training.max_steps=60")
    with ended(RunningCommand(tiny_corpus, tmp_path, "removed", *settings)) as command:
        command.until(lambda: 4 in command.checkpoints(), "first checkpoint")
        shutil.rmtree(tmp_path / "removed")
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "owner.json is gone" in finished.err
    again = run_command(*tiny_arguments(tiny_corpus, tmp_path, "removed"), *settings)
    assert again.code == 0, again.err
    assert again.result == finished.result
    assert exported_weights(str(tmp_path / "removed"))


@pytest.fixture(scope="module")
def cached(tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run `undisturbed` has filled its cache, which nobody disturbed."""
    storage = tmp_path_factory.mktemp("cached")
    done = run_command(*tiny_arguments(tiny_corpus, storage, "undisturbed"), *_with_cache(storage))
    assert done.code == 0, done.err
    return storage


@pytest.mark.parametrize("victim", ["driver", "_fill_cache", "_compute", "MapWorker"])
def test_a_kill_while_the_cache_is_filled_changes_nothing(
    victim: str, tiny_corpus: Corpus, tmp_path: Path, cached: Path
) -> None:
    with ended(RunningCommand(tiny_corpus, tmp_path, "filling", *_with_cache(tmp_path))) as command:
        command.until(lambda: list((tmp_path / "cache").glob("audio-*/*.arrow")), "first file of the cache")
        (command.driver() if victim == "driver" else command.actors(victim)[0]).kill()
        assert not command.run.joinpath("metrics.jsonl").exists(), "killed too late"
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert_same_run(finished.result, json.loads((cached / "undisturbed/result.json").read_text()))
    files = [{file.relative_to(folder / "cache"): file.read_bytes() for file in (folder / "cache").rglob("*.arrow")}
             for folder in (tmp_path, cached)]  # fmt: skip
    assert files[0] == files[1]
    if victim in ("_compute", "MapWorker"):  # halves that the others leave go an hour later
        assert list(tmp_path.rglob("*.part")) == []


def _with_cache(storage: Path) -> list[str]:
    return [*REFERENCE, "model.train_base=frozen", f"data.feature_cache={storage}/cache"]


def test_a_study_under_random_kills_ends_with_whole_trials(tiny_corpus: Corpus, tmp_path: Path) -> None:
    random = np.random.default_rng()
    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space={"training.clip_norm": {"choice": [1.0, 2.0, 3.0, 4.0]}},
        set={"training.max_steps": 30, "training.save_every": 2, "training.log_samples": True},
        resources={"concurrent": 2, "retries": 5},
    )
    folder, killed = tmp_path / "runs/study", []
    with ended(RunningSweep(sweep, folder)) as command:
        while command.process.poll() is None:
            # Counted in steps, so that a slow machine gets on between two kills, too.
            reached = _steps(folder) + int(random.integers(5, 25))
            while _steps(folder) < reached and command.process.poll() is None:
                time.sleep(0.5)
            time.sleep(float(random.uniform(0, 15)))
            fault = str(random.choice(["RayTrainWorker", "TrainController", "driver"]))
            try:
                victim = command.driver() if fault == "driver" else random.choice(command.actors(fault))
                victim.kill()
                killed.append(fault)
            except (ValueError, AssertionError, psutil.NoSuchProcess):  # there was none, or it had ended
                continue
        finished = command.wait()
    print(f"\n{len(killed)} kills: {killed}")
    assert finished.code == 0, finished.err
    for trial in trials_in(folder):
        assert (trial.status, trial.percent) == ("finished", 100.0)
        assert [record["step"] for record in records(str(folder / trial.name), "train")] == list(range(1, 31))


def _steps(study: Path) -> int:
    """Steps in the metrics of all trials."""
    return sum(file.read_text().count('"kind": "train"') for file in study.glob("*/metrics.jsonl"))
