import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mowe_ray.config.schema import TrackingSection
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.tracker import Tracker
from mowe_ray.training.trackers.base import flatten
from tests.trackers import tensorboard_of, wandb_history


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path), "run")


def make_tracker(folder: RunFolder, resume_step: int = 0, **changes) -> Tracker:
    tracking = TrackingSection.model_validate(changes)
    return Tracker(folder, name="run", config={"seed": 1}, resume_step=resume_step, tracking=tracking)


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
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/routing.load.a"}
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
    assert set(events.Tags()["scalars"]) == {"train/routing.load.b"}


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


def validation(step: int, source: str) -> dict:
    tasks = {"asr": {"score": 0.5 * step, "majority": 0.1, "samples": 4}}
    return {"kind": "validation", "source": source, "step": step, "loss": 1.0, "tasks": tasks}


def test_validation_sources_have_names_of_their_own(folder, tmp_path):
    tracker = make_tracker(folder, tensorboard=True)
    for step in (1, 2):
        for source in ("clean", "noisy"):
            tracker.log(validation(step, source))
    tracker.close()
    scalars = tensorboard_of(tmp_path / "run")
    assert {f"validation/{source}/{name}" for source in ("clean", "noisy") for name in ("loss", "asr/score")} <= set(
        scalars
    )
    assert scalars["validation/noisy/asr/score"] == [(1, 0.5), (2, 1.0)]


def test_tensorboard_is_complete_while_a_run_goes_on_and_after_it_was_killed(folder, tmp_path):
    killed = make_tracker(folder, tensorboard=True)
    for step in (1, 2, 3, 4):
        killed.log(record(step))
        assert [s for s, _ in tensorboard_of(tmp_path / "run")["train/loss"]] == list(range(1, step + 1))
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # a record that was being written
    resumed = make_tracker(folder, resume_step=2, tensorboard=True)
    for step in (3, 4, 5):
        resumed.log(record(step))
    assert tensorboard_of(tmp_path / "run")["train/loss"] == [(s, pytest.approx(1 / s)) for s in range(1, 6)]


def test_tensorboard_on_an_object_store_survives_the_machine(tmp_path):
    folder = RunFolder("memory://tracked", "run")
    lost = make_tracker(folder, tensorboard=True)
    for step in (1, 2, 3):
        lost.log(record(step))
    lost.flush()  # before the checkpoint of step 3
    lost.log(record(4))  # never copied
    resumed = make_tracker(folder, resume_step=3, tensorboard=True)
    for step in (4, 5):
        resumed.log(record(step))
    resumed.close()
    (tmp_path / "tensorboard").mkdir()
    for name in folder.names("tensorboard"):
        folder.fetch(f"tensorboard/{name}", tmp_path / "tensorboard" / name)
    assert [step for step, _ in tensorboard_of(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]


@pytest.mark.slow  # a second between two tries
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_tensorboard_catches_up_after_a_full_disk(small_disk):
    folder = RunFolder(str(small_disk), "run")
    lines: list[str] = []
    tracking = TrackingSection(tensorboard=True)
    tracker = Tracker(folder, name="run", config={}, resume_step=0, tracking=tracking, warn=lines.append)
    tracker.log(record(1))
    fill(small_disk / "ballast")
    for step in range(2, 80):
        tracker.log(record(step))
    (small_disk / "ballast").unlink()
    time.sleep(1.1)
    tracker.log(record(80))
    assert [step for step, _ in tensorboard_of(small_disk / "run")["train/loss"]] == list(range(1, 81))
    assert all(file.stat().st_size for file in (small_disk / "run" / "tensorboard").iterdir())
    assert len(lines) == 1
    assert lines[0].startswith("warning: a tracker failed, training goes on: OSError")


def test_audio_of_answers_and_pictures_are_in_tensorboard(folder, tmp_path):
    from matplotlib import pyplot

    tracker = make_tracker(folder, tensorboard=True)
    picture = io.BytesIO()
    pyplot.imsave(picture, np.zeros((4, 6, 4)), format="png")
    answers = [Answer("a|1", "asr", "say it", "x", ["y"])]
    for step in (1, 2):
        tracker.log_picture("routing/held", step, picture.getvalue())
        for source in ("held", "calls"):  # their ids may be the same
            tracker.log_samples(source, step, answers, {"a|1": np.zeros(160, np.float32)})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(image.width, image.height) for image in events.Images("routing/held")] == [(6, 4)] * 2
    for source in ("held", "calls"):
        assert [audio.step for audio in events.Audio(f"validation/{source}/a|1")] == [1], "a clip never changes"
    text = events.Tensors("validation/held/samples/text_summary")[1].tensor_proto.string_val[0].decode()
    assert r"a\|1|asr|say it|y|x" in text


@pytest.mark.slow
def test_mlflow_goes_on_with_its_run(folder, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "mlruns").as_uri()
    killed = make_tracker(folder, mlflow=uri)
    for step in (1, 2, 3):
        killed.log(record(step))
    killed.close()
    resumed = make_tracker(folder, resume_step=2, mlflow=uri)
    for step in (3, 4):
        resumed.log(record(step))
    resumed.log(validation(4, "held"))
    for source in ("held", "calls"):  # their ids may be the same
        resumed.log_samples(source, 4, [Answer("a", "asr", "say it", "x", ["y"])], {"a": np.zeros(160, np.float32)})
    resumed.close()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mowe_ray").experiment_id])
    assert run.info.run_id == json.loads(folder.read_text("trackers.json"))["mlflow"]
    assert run.data.params == {"seed": "1"}
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(s, pytest.approx(1 / s)) for s in range(1, 5)]
    assert run.data.metrics["validation/held/asr/score"] == 2.0
    for source in ("held", "calls"):
        assert [file.path for file in client.list_artifacts(run.info.run_id, f"samples/{source}")] == [
            f"samples/{source}/a.flac",
            f"samples/{source}/step-00000004.json",
        ]


@pytest.mark.slow
def test_wandb_offline_is_one_history_and_a_run_has_an_id_of_its_own(tmp_path):
    ids = set()
    for study in ("first", "second"):  # trials of two studies share names
        folder = RunFolder(str(tmp_path / study), "trial-0000")
        killed = make_tracker(folder, wandb={"mode": "offline", "group": study})
        for step in (1, 2, 3):
            killed.log(record(step))
        killed.close()
        resumed = make_tracker(folder, resume_step=2, wandb={"mode": "offline", "group": study})
        for step in (3, 4):
            resumed.log(record(step))
        resumed.close()
        rows = wandb_history(tmp_path / study / "trial-0000")
        assert [row["train/step"] for row in rows if "train/step" in row] == [1, 2, 3, 4]
        ids.add(json.loads(folder.read_text("trackers.json"))["wandb"])
    assert len(ids) == 2


ENDLESS = """
import itertools, sys, time
from mowe_ray.config.schema import TrackingSection
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.tracker import Tracker
tracking = TrackingSection.model_validate({"tensorboard": True, "wandb": {"mode": "offline"}})
tracker = Tracker(RunFolder(sys.argv[1], "run"), name="run", config={}, resume_step=0, tracking=tracking)
for step in itertools.count(1):
    tracker.log({"kind": "train", "step": step, "loss": 1 / step})
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_logs_leaves_one_history(folder, tmp_path):
    """The trackers' part of `tests/integration/test_tracking.py`, which kills a whole run."""
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 120
        while len(folder.read_lines("metrics.jsonl")) < 40:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    killed_at = len(folder.read_lines("metrics.jsonl"))
    both = {"tensorboard": True, "wandb": {"mode": "offline"}}
    resumed = make_tracker(folder, resume_step=killed_at - 7, **both)
    steps = list(range(1, killed_at + 6))
    for step in steps[killed_at - 7 :]:
        resumed.log({"kind": "train", "step": step, "loss": 1 / step})
    resumed.close()
    assert [step for step, _ in tensorboard_of(tmp_path / "run")["train/loss"]] == steps
    assert [row["train/step"] for row in wandb_history(tmp_path / "run")] == steps
