"""Studies on a real cluster: early stopping gives workers back, populations copy, faults stay with their trial."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from mowe_ray.config import load_config
from mowe_ray.data.synthetic_corpus import builtin_samples
from mowe_ray.distributed.ray_train.published import PublishedSources, publisher_of_store
from mowe_ray.distributed.ray_tune.tuner import scheduler_of
from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.report.results import ResultsWriter
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import Validation, run_folder
from tests.end_to_end import ROOT
from tests.faults import RunningSweep, ended, fill
from tests.tiny_runs import Corpus, records, tiny_arguments, tiny_config
from tests.tiny_sweeps import log_of, run_here, trials_in, write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RATES = {"training.learning_rate": {"choice": [3e-3, 1e-8]}}


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def test_early_stopping_gives_the_workers_back_at_once(ray_cluster: None, tiny_corpus: Corpus, tmp_path: Path) -> None:
    whole = free_cpus()
    waits: dict[int, float] = {}

    def show(study: Study) -> None:
        """Hold the study after each stop until all CPUs are free: nobody else can have freed them."""
        for trial in study.trials.values():
            if trial.status == "stopped" and trial.number not in waits:
                began = time.monotonic()
                while free_cpus() < whole:
                    assert time.monotonic() - began < 60, f"{trial.name} keeps {whole - free_cpus()} CPUs"
                    time.sleep(0.1)
                waits[trial.number] = time.monotonic() - began

    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space=RATES,
        objective={"metric": "loss"},
        scheduler={"kind": "asha", "grace_percent": 30, "reduction_factor": 2},
        set={"compute.num_workers": 2},
        resources={"concurrent": 1},
    )
    study = run_here(sweep, show=show)
    trials = study.trials
    assert [trials[n].status for n in range(2)] == ["finished", "stopped"]
    assert [trials[n].step for n in range(2)] == [12, 4]
    assert sorted(waits) == [1]
    print("seconds until the CPUs of a stopped trial were free:", waits)
    assert free_cpus() == whole
    # A stopped trial has saved what it has, and is not run again.
    assert list((tmp_path / "runs/study/trial-0001/checkpoints").glob("step-*/checkpoint.json"))
    again = run_here(sweep)
    assert [trial.attempts for trial in again.trials.values()] == [1, 1]


def test_trials_with_equal_data_share_one_index(ray_cluster: None, tiny_corpus: Corpus, tmp_path: Path) -> None:
    """Each trial's driver made the index and put it into the object store again."""
    sources_of = publisher_of_store()

    def published(*overrides: str) -> PublishedSources:
        config = tiny_config(tiny_corpus, tmp_path, "unused", "training.max_steps=1", *overrides)
        return sources_of(config, [])

    first, same, shorter = (
        published(),
        published("data.batch_seconds=77", "seed=5"),
        published("data.max_duration_s=20"),
    )
    assert first.train == same.train != shorter.train
    assert len(ray.get(first.train)) == len(ray.get(shorter.train)) == 40
    assert (len(ray.get(first.validation["held_out"])), first.report.bad_count) == (10, 0)
    with pytest.raises(ValueError, match=r"^data.train.0.path: .*/nowhere"):
        published("data.train.0.path=/nowhere")


@pytest.mark.parametrize("kind", ["asha", pytest.param("median", marks=pytest.mark.soak)])
def test_a_study_that_goes_on_compares_with_the_trials_before(kind: str, tiny_corpus: Corpus, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space={"training.learning_rate": {"choice": [0.1, 0.2, 0.3, 0.4]}},
        scheduler={"kind": kind, "grace_percent": 20, "reduction_factor": 2},
    )
    study = Study(load_sweep(sweep), cost=lambda config: None)
    for number, score in enumerate((0.9, 0.8, 0.7)):
        study.next_trial()
        tasks = {"er": {"score": score, "majority": 0.1, "samples": 9}}
        line = {"kind": "validation", "source": "held_out", "step": 5, "loss": 1.0, "tasks": tasks}
        run_folder(study.folder, study.trials[number]).append_text("metrics.jsonl", json.dumps(line) + "\n")
        study.validated(number, Validation(5, 1.0, tasks), percent=50.0, wall_s=1.0, changed={})
        study.over(number, "finished")
    for score, decision in ((0.1, TrialScheduler.STOP), (0.95, TrialScheduler.CONTINUE)):
        scheduler = scheduler_of(study)
        trial = TuneTrial("new", stub=True, trial_id="trial-0003")
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"percent": 50.0, "objective": score}) == decision


@pytest.mark.soak
def test_a_population_copies_the_better_and_changes_a_little(
    ray_cluster: None, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space={"training.learning_rate": {"loguniform": [1e-8, 1e-2]}},
        search={"kind": "random", "seed": 1},
        budget={"points": 2},
        objective={"metric": "loss"},
        scheduler={"kind": "pbt", "interval_percent": 30, "quantile": 0.5, "resample_probability": 0},
        resources={"concurrent": 2},
    )
    study = run_here(sweep)
    folder, trials = tmp_path / "runs/study", list(study.trials.values())
    assert [trial.status for trial in trials] == ["finished", "finished"]
    assert [trial.step for trial in trials] == [12, 12]
    copied = [trial for trial in trials if "continuing from step" in log_of(folder, trial)]
    assert copied, [log_of(folder, trial) for trial in trials]
    for trial in copied:
        donor = trials[1 - trial.number]
        assert f"of {donor.name}" in log_of(folder, trial)
        # Changed by a fifth each time, from the donor's rate at that time.
        config = json.loads((folder / trial.name / "config.json").read_text())
        assert config["training"]["learning_rate"] == trial.changed["training.learning_rate"]
        assert trial.changed["training.learning_rate"] != trial.values["training.learning_rate"]
        steps = [record["step"] for record in records(str(folder / trial.name), "train")]
        assert steps[-1] == 12
        assert len(set(steps)) == len(steps)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["hyperband", "median"])
def test_every_other_scheduler_comes_to_an_end(
    kind: str, ray_cluster: None, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    whole = free_cpus()
    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space={"training.learning_rate": {"choice": [1e-8, 1e-7, 3e-3, 1e-3]}},
        objective={"metric": "loss"},
        scheduler={"kind": kind, "grace_percent": 30},
        resources={"concurrent": 2},
    )
    trials = run_here(sweep).trials
    assert {trial.status for trial in trials.values()} <= {"finished", "stopped"}
    assert any(trial.status == "finished" for trial in trials.values())
    # A trial that was paused has gone on from its own checkpoint: no step is missing, none is there twice.
    for trial in trials.values():
        steps = [record["step"] for record in records(str(tmp_path / "runs/study" / trial.name), "train")]
        assert steps == list(range(1, len(steps) + 1))
    deadline = time.monotonic() + 60
    while free_cpus() < whole:
        assert time.monotonic() < deadline, f"{whole - free_cpus()} CPUs are still taken"
        time.sleep(0.1)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "sweeps").glob("*.yaml")))
def test_shipped_studies_run(name: str, ray_cluster: None, tiny_corpus: Corpus, tmp_path: Path) -> None:
    study = run_here(
        ROOT / "sweeps" / f"{name}.yaml",
        *tiny_arguments(tiny_corpus, tmp_path, name),
        *("training.max_steps=4", "training.eval_every=2", "seeds=[0]", "budget.points=2"),
    )
    result = ResultsWriter(study).write()
    assert {trial.status for trial in study.trials.values()} <= {"finished", "stopped"}
    assert len(study.trials) == 2
    assert result["best"] is not None
    assert result["answer"]
    # The last answers of two points, on the same clips.
    assert len((tmp_path / name / "scores.csv").read_text().splitlines()) > 2
    assert study.sweep.question in (tmp_path / name / "report.html").read_text()
    best = load_config(tmp_path / name / "best.yaml")
    assert (best.name, best.data.train[0].path) == (f"{name}-best", str(tiny_corpus.train))


@pytest.mark.soak  # three minutes
def test_a_killed_study_goes_on_where_it_was(tiny_corpus: Corpus, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space={"model.router.top_k": {"choice": [1, 2]}, "training.clip_norm": {"choice": [1.0, 2.0]}},
        # Each trial holds longer than a look at the processes takes.
        set={"training.save_every": 4, "training.eval_every": 20, "training.max_steps": 60},
        resources={"concurrent": 2},
    )
    folder = tmp_path / "runs/study"
    with ended(RunningSweep(sweep, folder)) as command:

        def middle() -> bool:
            trials = trials_in(folder) if folder.exists() else []
            running = [folder / trial.name / "checkpoints" for trial in trials if trial.status == "running"]
            saved = [int(path.parent.name[5:]) for at in running for path in at.glob("step-*/checkpoint.json")]
            return any(trial.status == "finished" for trial in trials) and any(step <= 20 for step in saved)

        command.until(middle, "a finished trial and a checkpoint of another")
        driver = command.driver()
        command.process.kill()
        driver.kill()
        driver.wait()
    before = {trial.number: trial for trial in trials_in(folder)}
    results = {n: (folder / t.name / "result.json").stat() for n, t in before.items() if t.status == "finished"}
    with ended(RunningSweep(sweep, folder)) as command:
        finished = command.wait(800)
    assert finished.code == 0, finished.err
    trials = trials_in(folder)
    assert [(t.number, t.status) for t in trials] == [(n, "finished") for n in range(4)]
    assert {json.dumps(t.values, sort_keys=True) for t in trials} == {
        json.dumps({"model.router.top_k": k, "training.clip_norm": c}, sort_keys=True)
        for k in (1, 2)
        for c in (1.0, 2.0)
    }
    for trial in trials:
        assert [record["step"] for record in records(str(folder / trial.name), "train")] == list(range(1, 61))
        if trial.number in results:
            now = (folder / trial.name / "result.json").stat()
            assert (now.st_ino, now.st_mtime_ns) == (results[trial.number].st_ino, results[trial.number].st_mtime_ns)
            assert trial.attempts == before[trial.number].attempts
        elif list((folder / trial.name / "checkpoints").glob("step-*")) and trial.number in before:
            assert trial.attempts == 2
    resumed = [trial for trial in trials if "continuing after step" in log_of(folder, trial)]
    assert resumed, "nothing was resumed from a checkpoint"
    assert finished.result["trials"]["finished"] == 4


@pytest.mark.soak
def test_faults_stay_with_their_trial_and_are_told(tiny_corpus: Corpus, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space={"case": {"settings": cases(tiny_corpus, tmp_path)}},
        set={"compute.max_failures": 0, "training.step_timeout_s": 20, "training.max_steps": 4},
        resources={"concurrent": 2, "retries": 1, "share_features": False},  # or clips would be read from there
    )
    folder = tmp_path / "runs/study"
    with ended(RunningSweep(sweep, folder)) as command:
        command.until(lambda: tokenizer_of(folder, "hangs").exists(), "tokenizer of the trial that is to hang")
        hang(tmp_path / "hanging")
        finished = command.wait(1000)
    trials = {trial.values["case"]: trial for trial in trials_in(folder)}
    print({case: (trial.status, trial.attempts, trial.error) for case, trial in trials.items()})
    assert finished.code == 3, finished.err
    assert {case: trial.status for case, trial in trials.items()} == {
        "good": "finished",
        "fails": "failed",
        "hangs": "failed",
        "bad_data": "failed",
    }
    assert finished.result["trials"] == {"running": 0, "waiting": 0, "finished": 1, "stopped": 0, "failed": 3}
    assert finished.result["best"]["values"] == {"case": "good"}
    assert [trials[case].attempts for case in ("good", "fails", "hangs", "bad_data")] == [1, 2, 2, 2]
    for case, told in (("fails", "steps in a row were skipped"), ("hangs", "20 s"), ("bad_data", "unusable")):
        assert told in (trials[case].error or ""), (case, trials[case].error)
    report = (folder / "report.html").read_text()
    assert "steps in a row were skipped" in report
    assert load_config(folder / "best.yaml").name == "study-best"


def cases(corpus: Corpus, folder: Path) -> dict[str, dict[str, Any]]:
    """One run that ends well, and three that cannot."""
    return {
        "good": {},
        "fails": {"training.learning_rate": 1e30, "training.max_skipped_steps": 1},
        "hangs": {"data.train": [{"path": str(write_clips(folder / "hanging"))}]},
        "bad_data": {"data.train": [{"path": str(corpus.train)}, {"path": str(broken_corpus(folder / "broken"))}]},
    }


def tokenizer_of(study: Path, case: str) -> Path:
    """What a run writes when its clips have been scanned and their texts read, seconds before its first step."""
    trials = trials_in(study) if study.exists() else []
    name = next((trial.name for trial in trials if trial.values["case"] == case), "none")
    return study / name / "tokenizer.json"


def hang(folder: Path) -> None:
    """Make pipes of all clips: opening one waits for ever, as a file server does that has stopped to answer."""
    for clip in folder.glob("*.flac"):
        clip.unlink()
        os.mkfifo(clip)


def broken_corpus(folder: Path) -> Path:
    """Write a manifest whose clips are not audio, all but their headers."""
    manifest = write_clips(folder)
    for clip in folder.glob("*.flac"):
        content = clip.read_bytes()
        clip.write_bytes(content[:200] + bytes(len(content) - 200))
    return manifest


def write_clips(folder: Path) -> Path:
    folder.mkdir()
    for sample in builtin_samples("train", 12):
        (folder / f"{sample.id}.flac").write_bytes(sample.audio or b"")
        fields = {"instruction": sample.instruction, "answer": sample.answer, "task": sample.task}
        with (folder / "clips.jsonl").open("a") as manifest:
            manifest.write(json.dumps({"audio": str(folder / f"{sample.id}.flac"), **fields}) + "\n")
    return folder / "clips.jsonl"


@pytest.mark.soak  # two minutes
def test_a_full_disk_delays_a_study_and_costs_it_nothing(tiny_corpus: Corpus, disk: Path) -> None:
    sweep = write_sweep(
        disk,
        tiny_corpus,
        space={"training.clip_norm": {"choice": [1.0, 2.0, 3.0]}},
        set={"training.max_steps": 60, "training.eval_every": 10},
        resources={"concurrent": 1, "share_features": False},
    )
    folder, ballast = disk / "runs/study", disk / "ballast"
    with ended(RunningSweep(sweep, folder)) as command:
        command.until(
            lambda: any(trial.step for trial in trials_in(folder)) if folder.exists() else False, "validation"
        )
        fill(ballast)
        command.until(lambda: "cannot be written, new trials wait" in command.said, "warning")
        ballast.unlink()
        finished = command.wait(600)
    assert finished.code == 0, finished.err
    assert "the driver died" not in finished.err
    assert finished.result["trials"]["finished"] == 3
    for trial in trials_in(folder):
        assert (trial.status, trial.attempts, trial.percent) == ("finished", 1, 100.0)
        assert [record["step"] for record in records(str(folder / trial.name), "train")] == list(range(1, 61))
