"""The page of a run: what it shows of made records, and that it never stands in the way of the run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.evaluation.targets import folder_at
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.report import main
from mowe_ray.training.run_records import course, read_run
from mowe_ray.training.run_report import page_while_training, run_page
from tests.html_page import Page


def train(step: int, **more: Any) -> dict[str, Any]:
    routing = {
        name: {"load": {"a": 0.5, "b": 0.5}, "probability": {"a": 0.6, "b": 0.4}, "entropy": 0.67} for name in ROUTERS
    }
    routing["dependent"]["mutual_information"] = 0.1
    return {
        "kind": "train", "step": step, "loss": 3.2 - step / 50, "lm_loss": 3.0 - step / 50, "routing_loss": 0.2,
        "routing_loss_diversity": -1.0, "grad_norm": 1.0, "audio_s_per_s": 40.0, "data_wait_share": 0.02,
        "padding_share": 0.25, "learning_rate_factor": 1.0, "left_s": 95.0, "peak_memory_bytes": 2_500_000_000,
        "routing": routing, **more,
    }  # fmt: skip


ROUTERS = ("dependent", "independent")
TASKS = {"asr": {"score": 0.4, "majority": 0.2, "samples": 90}, "er": {"score": 0.4, "majority": 0.3, "samples": 90}}
RECORDS = [
    train(10),
    {"kind": "validation", "source": "built", "step": 10, "loss": 2.5, "tasks": TASKS},
    {"kind": "recovery", "step": 10, "seconds": 12.5, "restart": 8.0, "load": 4.5},
    {"kind": "skipped", "step": 12, "reason": "loss", "ids": ["s<1>"]},
    {"kind": "spike", "step": 15, "loss": 9.0, "expected": 2.0, "ids": ["s2"]},
    train(20, lm_loss=None),
    train(30),
]


def made_run(folder: Path | str, name: str = "one", **training: Any) -> RunFolder:
    run = RunFolder(str(folder), name)
    members = [{"name": "a", "train": "frozen"}, {"name": "b", "train": "frozen"}]
    keys = {"max_steps": 60, "learning_rate": 1e-3, **training}
    run.write_json("config.json", {"name": name, "model": {"weak_encoders": members}, "training": keys})
    run.write_lines("metrics.jsonl", (json.dumps(record) + "\n" for record in RECORDS))
    sources = {"built": {"causes": {"silent": 2}}}
    run.write_json("data_report.json", {"samples": 40, "bad": 2, "sources": sources})
    run.write_text("checkpoints/step-00000030/checkpoint.json", "{}")
    return run


def test_a_course_has_the_records_that_have_the_number() -> None:
    records = [train(1), train(2, lm_loss=None), train(3, lm_loss=math.nan), train(4, lm_loss=True)]
    assert course(records, "lm_loss")[0] == (1.0, 2.98)
    assert [step for step, _ in course(records, "routing", "dependent", "load", "a")] == [1, 2, 3, 4]
    assert [step for step, _ in course(records, "lm_loss")] == [1.0, 4.0]


def test_the_page_of_a_run_shows_its_course_and_its_events(tmp_path: Path) -> None:
    page = Page(run_page([read_run(made_run(tmp_path))]))
    assert page.stands_alone()
    assert page.not_numbers() == []
    assert page.headings() == ["Learning", "Scores on validation", "Speed", "Routers", "What happened"]
    assert page.of("p")[1:2] == ["1 of 2 tasks (asr) scores clearly above the most frequent answer after step 10."]
    assert "At step 30 of 60, 1m35s left at this pace." in page.of("p")
    assert {"2.5 GB", "40", "2", "1"} <= set(page.of("div", "b"))
    events = page.of("td")
    assert "restarted in 12s" in events
    assert "s<1>" in events
    curves = [json.loads(str(a["data-curves"])) for e, a in page.elements if e == "svg" and "data-curves" in a]
    loss = next(series for _, _, _, found in curves for series in found if series[0] == "training")
    assert loss[1] == [[10.0, 2.8], [30.0, 2.4]]


def test_several_runs_lie_over_each_other_with_what_differs(tmp_path: Path) -> None:
    runs = [read_run(made_run(tmp_path, "one")), read_run(made_run(tmp_path, "two", learning_rate=2e-3))]
    page = Page(run_page(runs))
    assert page.stands_alone()
    assert page.headings()[:2] == ["Side by side", "Configurations"]
    assert "They all have a loss on validation of 2.500." in page.texts
    assert page.of("td", "code") == ["training.learning_rate"]
    assert {"0.001", "0.002"} <= set(page.of("td"))
    curves = [json.loads(str(a["data-curves"])) for e, a in page.elements if e == "svg" and "data-curves" in a]
    assert all([name for name, _ in found if name in ("one", "two")] == ["one", "two"] for _, _, _, found in curves[:1])


def test_several_runs_stand_side_by_side_with_the_best_of_each_column(tmp_path: Path) -> None:
    one, two = made_run(tmp_path), made_run(tmp_path, "two")
    better = [
        {**r, "loss": 2.0, "tasks": {"asr": TASKS["asr"], "er": {**TASKS["er"], "score": 0.3}}} for r in RECORDS[1:2]
    ]
    two.write_lines("metrics.jsonl", (json.dumps(r) + "\n" for r in [RECORDS[0], *better, *RECORDS[2:]]))
    page = Page(run_page([read_run(one), read_run(two)]))
    assert "Side by side" in page.headings()
    assert "two has the lowest loss on validation, 2.000; one has 2.500." in page.texts
    assert page.of("td", "b") == ["0.400", "0.400", "40", "2.000", "0.400", "40"]  # equal ones are all the best
    assert "Side by side" not in Page(run_page([read_run(one)])).headings()


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "new")
    run.write_json("config.json", {"name": "new", "training": {"epochs": 3}})
    page = Page(run_page([read_run(run)]))
    assert "Nothing has been trained yet." in page.of("p")
    assert "At step 0, for 3 epochs." in page.of("p")


@pytest.mark.parametrize("where", ["disk", "object storage"])
def test_the_page_is_there_when_the_run_has_ended(where: str, tmp_path: Path) -> None:
    run, said = made_run(tmp_path if where == "disk" else f"memory://{tmp_path.name}"), list[str]()
    with page_while_training(run, said.append):
        run.write_json("result.json", {"steps": 30})
    assert "Finished after 30 steps" in run.read_text("report.html")
    assert said == []


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    run, said = made_run(tmp_path), list[str]()
    (tmp_path / "one" / "report.html").mkdir()
    with page_while_training(run, said.append):
        pass
    (line,) = said
    assert re.match(r"warning: .*/one/report.html cannot be written: ", line)


def test_the_command_draws_runs_and_refuses_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = made_run(tmp_path, "one"), made_run(tmp_path, "two", max_steps=90)
    assert main([one.url]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == one.path("report.html")
    assert main([one.url, two.url]) == 0
    assert "training.max_steps" in one.read_text("comparison.html")
    assert main([one.url, "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").exists()
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "url"), [("/runs", "/runs"), ("/runs/", "/runs"), ("/", "/"), ("/a/b", "/a/b"), ("s3://b/c", "s3://b/c")]
)
def test_a_folder_at_the_root_is_not_one_of_the_working_folder(path: str, url: str) -> None:
    assert folder_at(path).url == url
