import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mowe_ray.config.schema import TrackingSection
from mowe_ray.data.data_report import DataReport, killers_in
from mowe_ray.data.sample import BadSample
from mowe_ray.evaluation.predictions import Answer, RouterChoice
from mowe_ray.evaluation.routing import routing_of
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import LINE
from mowe_ray.training.collate import Batch
from mowe_ray.training.monitor import Monitor
from mowe_ray.training.protocols import Ranks, RunError
from mowe_ray.training.tracker import Tracker
from mowe_ray.training.validation import ValidationResult, scores_of_tasks
from tests.thread_ranks import on_ranks, thread_ranks
from tests.unit.training.test_monitor_progress import result


def batch(*bad: str, ids: tuple[str, ...] = ()) -> Batch:
    found = [BadSample(name, "made", "silent") for name in bad]
    return Batch({}, 0, 0, 0.0, 0.0, list(ids), [], [], [], [], found)


def read_records(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def skipped(step: int, loss: float, rank: int):
    return result(step, loss=loss, grad_norm=math.inf, skipped=True, batches=[batch(ids=(f"r{rank}s{step}",))])


def make_monitor(ranks: Ranks, folder: RunFolder, lines: list[str], **changes) -> Monitor:
    tracker = None
    if ranks.is_rank_zero:
        tracker = Tracker(folder, name="r", config={}, resume_step=0, tracking=TrackingSection())
    values = {
        "report": DataReport({"made": 10}),
        "members": ["a", "b"],
        "start_progress": 0.0,
        "max_steps": 4,
        "log_every": 2,
        "max_bad_fraction": 0.3,
        "max_skipped_steps": 3,
        "learning_rates": {"learning_rate": 2e-4},
    }
    return Monitor(ranks=replace(ranks, log=lines.append), folder=folder, tracker=tracker, **values | changes)


def on_two_ranks(run: Callable[[Ranks], object]) -> list[RunError | None]:
    """Call `run(ranks)` in two threads; returns what each raised."""

    def guarded(ranks: Ranks) -> RunError | None:
        try:
            run(ranks)
        except RunError as error:
            return error
        return None

    return on_ranks(2, guarded)


def test_rank_0_logs_every_second_step_and_counts_all_ranks_bad_samples(tmp_path):
    folder, lines = RunFolder(str(tmp_path), "run"), []

    def run(ranks: Ranks) -> None:
        monitor = make_monitor(ranks, folder, lines)
        for step in (1, 2, 3, 4):
            monitor.step(result(step, batches=[batch(f"bad{ranks.rank}")]), progress=step / 4, last=step == 4)
        monitor.finish({})

    assert on_two_ranks(run) == [None, None]
    records = [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()]
    assert [(r["kind"], r["step"], r["loss"]) for r in records] == [("train", 2, 1.5), ("train", 4, 3.5)]
    assert len(lines) == 2
    report = json.loads(folder.read_text("data_report.json"))
    assert (report["samples"], report["bad"]) == (10, 2), "each once, however often it is met"
    assert report["sources"]["made"]["causes"] == {"silent": 2}


def test_too_much_bad_data_stops_all_ranks_together_and_leaves_the_report(tmp_path):
    folder = RunFolder(str(tmp_path), "run")

    def run(ranks: Ranks) -> None:
        monitor = make_monitor(ranks, folder, [], log_every=1)
        names = [f"bad{ranks.rank}{n}" for n in range(2)]
        monitor.step(result(1, batches=[batch(*names)]), progress=0.25, last=False)

    raised = on_two_ranks(run)
    assert all(isinstance(error, RunError) for error in raised)
    assert "4 of 10 samples (40%) are unusable: 4 silent in made" in str(raised[1])
    assert json.loads(folder.read_text("data_report.json"))["bad"] == 4


def test_a_clip_that_ended_its_decoder_is_told_and_written_at_once(tmp_path):
    folder, lines = RunFolder(str(tmp_path), "run"), []
    killers = [BadSample(name, "made", "crashed", f"x.tar: {name}", "x.tar") for name in "abc"]

    def run(ranks: Ranks) -> None:
        monitor = make_monitor(ranks, folder, lines, max_bad_fraction=0.5)
        # Rank 1 finds it, and again in the next epoch; all ranks learn of it with the next line of progress.
        found = Batch({}, 0, 0, 0.0, 0.0, [], [], [], [], [], killers[: ranks.rank])
        for step in (1, 2, 3, 4):
            monitor.step(result(step, batches=[found]), progress=step / 4, last=False)
            assert monitor.killers == (killers[:1] if step > 1 else [])
        assert killers_in(json.loads(folder.read_text("data_report.json"))) == killers[:1]
        monitor.validation(4, {"held": ValidationResult(1.0, {}, [], {}, killers[1:2])})
        late = Batch({}, 0, 0, 0.0, 0.0, [], [], [], [], [], killers[2:])
        monitor.step(result(5, batches=[late]), progress=1.0, last=False)
        monitor.close()  # stopped before the next line

    assert on_two_ranks(run) == [None, None]
    assert killers_in(json.loads(folder.read_text("data_report.json"))) == killers
    told = [line for line in lines if line.startswith("warning")]
    assert told == [f"warning: {name} is left out from now on (data_report.json), x.tar: {name}" for name in "abc"]


def test_a_validation_is_logged_by_source_and_told(tmp_path):
    folder, lines = RunFolder(str(tmp_path), "run"), []
    monitor = make_monitor(thread_ranks(1)[0], folder, lines)
    tasks = {"asr": {"score": 0.75, "majority": 0.5, "samples": 4}}
    bad = [BadSample("v", "held", "nan")]
    answer = Answer("i", "asr", "say it", "x", ["y"])
    results = {"held": ValidationResult(1.25, tasks, [answer], {}, bad)}
    monitor.validation(2, results)
    assert not folder.exists("answers/held.jsonl"), "only those of the last validation are kept"
    monitor.finish(results)
    assert [Answer.from_line(line) for line in folder.read_lines("answers/held.jsonl")] == [answer]
    (record,) = [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()]
    assert record == {"kind": "validation", "source": "held", "step": 2, "loss": 1.25, "tasks": tasks}
    assert lines == ["validation held at step 2: loss 1.250  asr 0.75 (majority 0.50)"]
    assert json.loads(folder.read_text("data_report.json"))["sources"]["held"]["causes"] == {"nan": 1}
    assert not folder.exists("router_report.json"), "nothing was routed"


@pytest.mark.slow
def test_the_router_report_keeps_validation_sources_apart(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    monitor = make_monitor(thread_ranks(1)[0], folder, [])
    one = RouterChoice([1.0, 0.0], [0.9, 0.1]), RouterChoice([0.0, 1.0], [0.2, 0.8])
    answers = [Answer(str(i), "asr", "?", "x", ["x"], 1.0, one[1], one[i % 2]) for i in range(4)]
    results = {
        "clean": ValidationResult(1.0, {}, [], routing_of(answers), []),
        "noisy": ValidationResult(1.0, {}, [], routing_of(answers[:1]), []),
        "text": ValidationResult(1.0, {}, [], {}, []),
    }
    monitor.finish(results)
    report = json.loads(folder.read_text("router_report.json"))
    assert {name: tasks["asr"]["clips"] for name, tasks in report["datasets"].items()} == {"clean": 4, "noisy": 1}
    assert report["datasets"]["clean"]["asr"]["dependent"]["load"] == {"a": 0.5, "b": 0.5}
    assert report["alarms"] == []
    assert folder.exists("router_report.png")


def test_the_last_step_is_always_logged(tmp_path):
    folder, lines = RunFolder(str(tmp_path), "run"), []
    monitor = make_monitor(thread_ranks(1)[0], folder, lines, log_every=100)
    for step in (1, 2, 3, 4):
        monitor.step(result(step), progress=step / 4, last=step == 4)
    assert [line.split("  ")[0] for line in lines] == ["step 4/4"]


def test_a_skipped_step_is_told_with_the_ids_of_all_ranks(tmp_path):
    folder, lines = RunFolder(str(tmp_path), "run"), []

    def run(ranks: Ranks) -> None:
        monitor = make_monitor(ranks, folder, lines)
        monitor.step(skipped(1, math.nan, ranks.rank), progress=0.1, last=False)
        monitor.step(result(2), progress=0.5, last=False)
        for step in (3, 4):
            monitor.step(skipped(step, 2.0, ranks.rank), progress=step / 4, last=step == 4)

    assert on_two_ranks(run) == [None, None], "never three in a row"
    assert read_records(folder, "skipped") == [
        {"kind": "skipped", "step": 1, "reason": "loss", "ids": ["r0s1", "r1s1"]},
        {"kind": "skipped", "step": 3, "reason": "gradient", "ids": ["r0s3", "r1s3"]},
        {"kind": "skipped", "step": 4, "reason": "gradient", "ids": ["r0s4", "r1s4"]},
    ]
    assert [(r["step"], r["loss"], r["skipped_steps"]) for r in read_records(folder, "train")] == [
        (2, 2.0, 1),
        (4, None, 3),
    ]
    assert lines[0] == "warning: step 1 skipped, its loss is not finite; samples: r0s1, r1s1"


def test_too_many_skipped_steps_in_a_row_stop_all_ranks_together(tmp_path):
    folder = RunFolder(str(tmp_path), "run")

    def run(ranks: Ranks) -> None:
        monitor = make_monitor(ranks, folder, [])
        for step in (1, 2, 3):
            monitor.step(skipped(step, math.nan, ranks.rank), progress=step / 4, last=False)

    raised = on_two_ranks(run)
    assert str(raised[0]) == str(raised[1])
    assert str(raised[0]).startswith("3 steps in a row were skipped, the last is step 3")
    assert "training.max_skipped_steps" in str(raised[0])
    assert "r0s3, r1s3" in str(raised[0])


def test_a_spike_is_told_and_stops_nothing(tmp_path):
    folder, lines = RunFolder(str(tmp_path), "run"), []

    def run(ranks: Ranks) -> None:
        monitor = make_monitor(ranks, folder, lines, max_steps=40, log_every=100, members=[])
        for step in range(1, 31):
            ids = tuple(f"r{ranks.rank}s{step}n{n}" for n in range(6))
            monitor.step(
                result(step, lm_loss=9.0 if step == 25 else 1.0, batches=[batch(ids=ids)]),
                progress=step / 40,
                last=False,
            )

    assert on_two_ranks(run) == [None, None]
    (spike,) = read_records(folder, "spike")
    assert (spike["step"], spike["loss"], spike["expected"]) == (25, 9.0, 1.0)
    assert spike["ids"] == [f"r{rank}s25n{n}" for rank in (0, 1) for n in range(6)]
    assert max(map(len, lines[0].splitlines())) <= LINE
    line = " ".join(lines.pop().split())
    assert not lines
    assert line.startswith("warning: loss spike at step 25: lm 9.000, expected about 1.000; samples: r0s25n0, ")
    assert line.endswith(" and 4 more")


@pytest.mark.slow
def test_a_validation_before_a_restart_is_not_logged_again(tmp_path):
    folder, lines = RunFolder(str(tmp_path), "r"), list[str]()
    results = {name: ValidationResult(1.0, {}, [], {}, []) for name in ("one", "two")}
    [ranks] = thread_ranks(1)
    make_monitor(ranks, folder, lines).validation(0, {"one": results["one"]})  # killed before the second source
    make_monitor(ranks, folder, lines).validation(0, results)
    assert [record["source"] for record in read_records(folder, "validation")] == ["one", "two"]
    assert len(lines) == 2


def test_routing_is_that_of_all_steps_since_the_line_before(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    choices = [RouterChoice([1.0, 0.0], [0.9, 0.1]), RouterChoice([0.0, 1.0], [0.3, 0.7])]
    sums = [routing_of([Answer("x", "asr", "?", "a", ["a"], 1.0, None, made)])["asr"] for made in choices]

    def run(ranks: Ranks) -> None:
        monitor = make_monitor(ranks, folder, [])
        for step, made in enumerate((sums[0], sums[1], sums[1], sums[1]), start=1):
            monitor.step(result(step, routing=made), progress=step / 4, last=step == 4)
        monitor.close()

    assert on_two_ranks(run) == [None, None]
    first, second = read_records(folder, "train")
    assert first["routing"]["dependent"]["load"] == {"a": 0.5, "b": 0.5}
    assert first["routing"]["dependent"]["probability"] == pytest.approx({"a": 0.6, "b": 0.4})
    assert first["routing"]["dependent"]["mutual_information"] > 0
    assert second["routing"]["dependent"]["load"] == {"a": 0.0, "b": 1.0}
    assert first["peak_memory_bytes"] > 1_000_000


def test_scores_keep_their_names_when_a_source_is_added():
    one = ValidationResult(1.0, {"asr": {"score": 1.0, "majority": 0.5, "samples": 1}}, [], {}, [])
    two = ValidationResult(
        1.0,
        {
            "asr": {"score": 0.2, "majority": 0.1, "samples": 3},
            "er": {"score": 0.5, "majority": 0.5, "samples": 2},
        },
        [],
        {},
        [],
    )
    assert scores_of_tasks({"one": one}) == {"asr": {"score": 1.0, "majority": 0.5}}
    assert scores_of_tasks({"one": one, "two": two}) == {
        "asr": {"score": 0.4, "majority": 0.2},
        "er": {"score": 0.5, "majority": 0.5},
    }
    assert two.scores == {"asr": 0.2, "er": 0.5}
