import contextlib
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.tracker import Tracker, flatten


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path), "run")


def make_tracker(folder: RunFolder, resume_step: int = 0, **changes) -> Tracker:
    off = {"wandb_mode": "off", "wandb_project": "p", "wandb_group": None, "tensorboard": False}
    return Tracker(folder, name="run", config={"seed": 1}, resume_step=resume_step, **off | changes)


def record(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1 / step, "routing": {"load": {"a": 0.5}}}


def test_a_resumed_run_drops_records_after_its_checkpoint_and_a_half_written_line(folder):
    first = make_tracker(folder)
    for step in (1, 2, 3):
        first.log(record(step))
    folder.append_text("metrics.jsonl", '{"kind": "train", "st')
    resumed = make_tracker(folder, resume_step=2)
    assert [r["step"] for r in resumed.records()] == [1, 2]
    resumed.log(record(3))
    assert resumed.records() == [record(1), record(2), record(3)]
    assert [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()] == resumed.records()


def test_a_new_run_in_an_old_folder_starts_with_no_records(folder):
    make_tracker(folder).log(record(1))
    assert make_tracker(folder, resume_step=0).records() == []


def test_tensorboard_files_end_up_in_the_run_folder(folder, tmp_path):
    tracker = make_tracker(folder, tensorboard=True)
    for step in (1, 2):
        tracker.log(record(step))
    tracker.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/step", "train/loss", "train/routing.load.a"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_tensorboard_of_a_resumed_run_has_the_steps_before_it(folder, tmp_path):
    interrupted = make_tracker(folder, tensorboard=True)
    for step in (1, 2, 3):
        interrupted.log(record(step))
    resumed = make_tracker(folder, resume_step=2, tensorboard=True)  # the interrupted one was never closed
    for step in (3, 4):
        resumed.log(record(step))
    resumed.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_nested_records_flatten_to_dotted_keys():
    assert flatten({"a": {"b": {"c": 1}}, "d": "x"}) == {"a.b.c": 1, "d": "x"}


def test_numbers_that_are_not_finite_are_null_in_the_file_and_absent_elsewhere(folder, tmp_path):
    tracker = make_tracker(folder, tensorboard=True)
    nan, infinity = float("nan"), float("inf")
    bad = {"loss": nan, "routing": {"load": {"a": infinity, "b": 0.5}}, "list": [nan, 1, "x"]}
    tracker.log({"kind": "train", "step": 1, **bad})
    tracker.close()
    line = folder.read_text("metrics.jsonl")
    assert not any(word in line for word in ("NaN", "Infinity"))
    assert json.loads(line) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "routing": {"load": {"a": None, "b": 0.5}},
        "list": [None, 1, "x"],
    }
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/step", "train/routing.load.b"}


def fill(ballast: Path) -> None:
    """Write until there is no room left."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def test_a_full_disk_keeps_records_until_there_is_room(small_disk):
    folder = RunFolder(str(small_disk), "run")
    tracker = make_tracker(folder)
    tracker.log(record(1))
    ballast = small_disk / "ballast"
    fill(ballast)
    for step in range(2, 60):  # more than what is left of the last page
        tracker.log(record(step))
    written = folder.read_text("metrics.jsonl").splitlines(keepends=True)
    assert len(written) < 59
    assert all(line.endswith("\n") for line in written)
    ballast.unlink()
    tracker.log(record(60))
    assert [r["step"] for r in tracker.records()] == list(range(1, 61))


@pytest.mark.slow
def test_trials_of_two_studies_are_two_runs_in_wandb(tmp_path):
    for study in ("first", "second"):
        folder = RunFolder(str(tmp_path / study), "trial-0000")
        tracker = Tracker(
            folder,
            name="trial-0000",
            config={"seed": 1},
            resume_step=0,
            wandb_mode="offline",
            wandb_project="p",
            wandb_group=study,
            tensorboard=False,
        )
        tracker.log(record(1))
        tracker.close()
        (written,) = (tmp_path / study / "trial-0000" / "wandb").glob("offline-run-*")
        assert written.name.endswith(f"-{study}-trial-0000")
