"""Terminals that are closed, and second drivers: a folder has one live driver at a time, and nobody's is unseen."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from mowe_ray.command_line import INTERRUPTED
from mowe_ray.output.lease import OWNER_FILE, STALE_S, Owner, held
from mowe_ray.output.run_folder import RunFolder
from tests.end_to_end import Finished, run_command
from tests.faults import CommandOnTerminal, RunningCommand, RunningSweep, ended
from tests.tiny_runs import REFERENCE, Corpus, assert_same_run, tiny_arguments
from tests.tiny_sweeps import write_sweep

pytestmark = pytest.mark.slow


def assert_refused(second: Finished, folder: Path, first: psutil.Process) -> None:
    assert second.code == 1
    assert second.result["error"].startswith(f"{folder} is in use by process {first.pid} on {os.uname().nodename}")
    assert f"kill {first.pid} on" in second.result["error"]
    assert "Traceback" not in second.err


def assert_saved_and_ended(command: RunningCommand, processes: list[psutil.Process]) -> int:
    """All processes end, and the last step that was trained is in a checkpoint; returns it."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
    assert command.checkpoints()[-1] == command.step(), "steps that nobody saw, and nobody saved"
    return command.step()


@pytest.mark.soak  # the supervisor on real terminals: test_supervisor.py
def test_a_closed_terminal_saves_and_ends_the_run_whose_folder_is_its_own_till_then(
    tiny_corpus: Corpus, tmp_path: Path
) -> None:
    endless = (*REFERENCE, "training.max_steps=100000")
    with ended(CommandOnTerminal(tiny_corpus, tmp_path, "dropped", *endless)) as command:
        command.until_step(1)
        driver, workers = command.driver(), command.workers(2)
        second = run_command(*tiny_arguments(tiny_corpus, tmp_path, "dropped"), *REFERENCE)
        assert_refused(second, command.run, driver)
        command.close_terminal()
        assert command.process.wait(60) == 128 + signal.SIGHUP
        assert_saved_and_ended(command, [driver, *workers])
        assert not (command.run / "result.json").exists()


@pytest.mark.soak  # two runs more
def test_a_killed_session_saves_as_well_and_the_run_ends_as_one_that_nobody_disturbed(
    tiny_corpus: Corpus, tmp_path: Path, reference: dict[str, Any]
) -> None:
    """A desktop session ends with SIGKILL: nobody hands the hang-up on, and standard error is gone as well."""
    with ended(CommandOnTerminal(tiny_corpus, tmp_path, "dropped", *REFERENCE)) as command:
        command.until_step(1)
        driver, workers = command.driver(), command.workers(2)
        command.process.kill()
        command.close_terminal()
        step = assert_saved_and_ended(command, [driver, *workers])
    finished = run_command(*tiny_arguments(tiny_corpus, tmp_path, "dropped"), *REFERENCE)
    assert finished.code == 0, finished.err
    assert f"continuing after step {step}" in finished.err
    assert_same_run(finished.result, reference)


def test_the_folders_of_an_evaluation_and_of_a_study_are_their_driver_s_own(
    tiny_corpus: Corpus, tmp_path: Path, reference: dict[str, Any]
) -> None:
    out = tmp_path / "evaluation"
    with held(RunFolder(str(tmp_path), "evaluation"), print):
        second = run_command(reference["run"], f"out={out}", module="mowe_ray.evaluate")
        assert_refused(second, out, psutil.Process())
    sweep = write_sweep(tmp_path, tiny_corpus, space={"training.clip_norm": {"choice": [1.0, 2.0]}})
    with held(RunFolder(str(tmp_path / "runs"), "study"), print):
        assert_refused(run_command(sweep, module="mowe_ray.sweep"), tmp_path / "runs/study", psutil.Process())


@pytest.mark.soak  # a minute and a half of watching
def test_the_folder_of_a_lost_machine_is_taken_over_whatever_its_clock_said(
    tiny_corpus: Corpus, tmp_path: Path
) -> None:
    lost = Owner("node-7", "another machine", 4242, "1", since="2090-01-01 00:00:00 +0000")
    RunFolder(str(tmp_path), "lost").write_json(OWNER_FILE, lost.__dict__)
    began = time.monotonic()
    finished = run_command(*tiny_arguments(tiny_corpus, tmp_path, "lost"), "training.max_steps=2")
    assert finished.code == 0, finished.err
    assert time.monotonic() - began > STALE_S
    assert "is held by process 4242 on node-7" in finished.err
    assert "taken over from process 4242 on node-7" in finished.err


@pytest.mark.soak  # the same lease and the same signals as a run's
def test_a_second_driver_of_a_study_is_refused_and_a_hang_up_ends_the_first(
    tiny_corpus: Corpus, tmp_path: Path
) -> None:
    sweep = write_sweep(
        tmp_path,
        tiny_corpus,
        space={"training.clip_norm": {"choice": [1.0, 2.0]}},
        set={"training.max_steps": 100_000, "training.save_every": 5},
        resources={"concurrent": 1},
    )
    folder = tmp_path / "runs/study"
    trial = folder / "trial-0000"
    with ended(RunningSweep(sweep, folder)) as command:
        command.until((trial / "metrics.jsonl").exists, "first trial")
        driver = command.driver()
        assert_refused(run_command(sweep, module="mowe_ray.sweep"), folder, driver)
        config = json.loads((trial / "config.json").read_text())
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump(config))
        alone = run_command("--config", tmp_path / "trial.yaml")
        assert alone.result["error"].startswith(f"{trial} is in use by process "), alone.err
        command.process.send_signal(signal.SIGHUP)
        stopped = command.wait(120)
        assert not driver.is_running()
    assert stopped.code == INTERRUPTED
    assert stopped.result["trials"]["waiting"] >= 1
    assert [Owner.parse((at / OWNER_FILE).read_bytes()).released for at in (folder, trial)] == [True, True]
