"""The evaluate command on exports made on the spot: its files, whoever wrote them, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mowe_ray.config import load_config
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.evaluate import main
from mowe_ray.evaluation.model_card import model_card
from mowe_ray.serving.app import Limits
from tests.browser import needs_browser, opened, serving
from tests.chat_server import Reply, chat_server
from tests.end_to_end import ROOT, tone_samples
from tests.exported_models import MEMBERS, TASKS, collapsed_model, export_to, steered_model, write_task_sounds
from tests.serving import serving as serving_models

pytestmark = pytest.mark.slow
PER_TASK = 6
QUICK = ["generation.max_new_tokens=5", "data.max_batch_size=4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with two exports and a corpus."""
    folder = tmp_path_factory.mktemp("made")
    export_to(folder / "steered", steered_model(PER_TASK))
    run = load_config("quickstart").model_dump(mode="json")
    (folder / "steered" / "README.md").write_text(model_card("steered", run, [], "0"))
    export_to(folder / "collapsed", collapsed_model())
    write_task_sounds(folder / "sounds", PER_TASK)
    return folder


def arguments(made: Path, out: Path, *more: str, models: tuple[str, ...] = ("steered",)) -> list[str]:
    return [*(str(made / model) for model in models), f"data.validation.0.path={made / 'sounds'}",
            "data.validation.0.name=validation", f"out={out}",
            *QUICK, *more]  # fmt: skip


def predictions(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("predictions/**/*.jsonl"))
            if ".steps." not in path.name}  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(made, ray_cluster, tmp_path_factory) -> Path:
    """Where both models were evaluated, by one worker."""
    out = tmp_path_factory.mktemp("evaluated")
    assert main(arguments(made, out, models=("steered", "collapsed"))) == 0
    return out


@pytest.mark.soak  # the same without Ray: test_served_answers.py
def test_a_model_at_a_server_is_scored_as_the_one_in_this_process(made, ray_cluster, tmp_path, capsys):
    with serving_models({"steered": steered_model(PER_TASK)}, Limits(max_new_tokens=5)) as server:
        words = arguments(made, tmp_path, f"{server.url}/v1", "ablation_samples=0")
        assert main(words) == 0
    own, other = (tmp_path / name / "predictions" / "validation.jsonl" for name in ("steered", "steered#2"))
    answers = [
        [(a["id"], a["answer"]) for a in map(json.loads, file.read_text().splitlines())] for file in (own, other)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 5 * PER_TASK
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("steered", "steered#2")]
    assert [one["scores"] for one in scores[0]["scores"]] == [one["scores"] for one in scores[1]["scores"]]
    assert scores[1]["stored"] is scores[1]["real_time_factor"] is None
    assert scores[1]["baseline"] == "steered"
    # The card of the export has what was found.
    assert "| validation | transcription |" in (made / "steered" / "README.md").read_text()
    # Nobody is asked again: the server is gone.
    assert main([*words[:-2], f"{server.url}/v1#steered", words[-1]]) == 0
    capsys.readouterr()
    assert main([f"{server.url}/v1#steered", *(word for word in words[1:-2] if not word.startswith("out="))]) == 2
    assert "out: name a folder" in capsys.readouterr().err


def test_every_model_has_its_files_and_the_report_holds_both(evaluated):
    for model in ("steered", "collapsed"):
        scores = json.loads((evaluated / model / "scores.json").read_text())
        assert [(one["task"], one["samples"]) for one in scores["scores"]] == [(task, 6) for task in sorted(TASKS)]
        assert {one["member"] for one in scores["ablation"]} == set(MEMBERS)
        assert scores["real_time_factor"] > 0
        lines = (evaluated / model / "predictions" / "validation.jsonl").read_text().splitlines()
        assert len({json.loads(line)["id"] for line in lines}) == 5 * PER_TASK
        assert all(Path(json.loads(line)["shard"]).exists() and json.loads(line)["place"] for line in lines)
        assert (evaluated / model / "router_report.png").read_bytes().startswith(b"\x89PNG")
    page = (evaluated / "report.html").read_text()
    assert "steered" in page
    assert "collapsed" in page
    assert not list(evaluated.rglob("*.part"))


def test_the_report_shows_a_router_that_sends_each_task_to_its_own_encoder(evaluated):
    report = json.loads((evaluated / "steered" / "router_report.json").read_text())
    for task, member in zip(TASKS, MEMBERS, strict=True):
        shown = report["datasets"]["validation"][task]
        assert shown["dependent"]["load"] == {name: float(name == member) for name in MEMBERS}
        assert shown["independent"]["load"] == {name: float(name == "wav2vec2") for name in MEMBERS}
        assert shown["overlap"] == float(member == "wav2vec2")
    assert report["alarms"] == []


def test_a_collapsed_router_raises_the_alarm(evaluated):
    report = json.loads((evaluated / "collapsed" / "router_report.json").read_text())
    assert any("hubert_one" in alarm for alarm in report["alarms"])
    assert report["alarms"][0] in (evaluated / "report.html").read_text()


@needs_browser
def test_its_report_asks_for_nothing_and_complains_of_nothing(evaluated, tmp_path):
    with serving(tmp_path) as server:
        page = opened((evaluated / "report.html").read_text(), server, tmp_path)
    assert page.console == []
    assert page.requests == [f"http://127.0.0.1:{server.server_port}/report.html"]
    assert page.dom.count('data-audio="data:audio/mpeg;base64,') == 5 * PER_TASK
    assert page.dom.count('role="alert"') == 4, "two alarms, above all and beside the router"


def test_two_workers_write_the_files_of_one(made, evaluated, tmp_path, capfd):
    assert main(arguments(made, tmp_path, "compute.num_workers=2")) == 0
    assert predictions(tmp_path / "steered") == predictions(evaluated / "steered")
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(result["models"]["steered"]["scores"]) == {f"validation/{task}" for task in TASKS}


@pytest.mark.soak  # every cut of its files: test_predictions.py
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_files(made, evaluated, tmp_path):
    command = [sys.executable, "-m", "mowe_ray.evaluate", *arguments(made, tmp_path)]
    steps = tmp_path / "steered" / "predictions" / "validation.steps.jsonl"
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ}, start_new_session=True)
        began = time.monotonic()
        while not steps.exists() or len(steps.read_text().splitlines()) < 3:
            assert first.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() - began < 120
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
    finished = steps.read_text().splitlines()
    assert main(arguments(made, tmp_path)) == 0
    # These hold how long each micro-batch took: they are the lines of the first process.
    assert steps.read_text().splitlines()[: len(finished)] == finished
    assert predictions(tmp_path / "steered") == predictions(evaluated / "steered")
    ours, theirs = (json.loads((path / "steered" / "scores.json").read_text()) for path in (tmp_path, evaluated))
    assert ours["scores"] == theirs["scores"]
    assert ours["ablation"] == theirs["ablation"]


def test_a_finished_evaluation_answers_nothing_again(made, evaluated, capfd):
    before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("export/*")}
    steps = (evaluated / "steered" / "predictions" / "validation.steps.jsonl").read_text()
    assert main(arguments(made, evaluated, models=("steered", "collapsed"))) == 0
    assert "answered" not in capfd.readouterr().err
    assert (evaluated / "steered" / "predictions" / "validation.steps.jsonl").read_text() == steps
    assert {path: path.stat().st_mtime_ns for path in evaluated.rglob("export/*")} == before


def test_a_judge_scores_what_it_is_for(made, evaluated, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "secret-4711")
    shutil.copytree(evaluated / "steered", tmp_path / "steered")  # with its answers
    with chat_server(lambda number, request: Reply("Explanation: good.\nRating: 1")) as server:
        more = [f"judge.base_url={server.url}", "judge.model=wise", "judge.api_key_env=THE_KEY", "ablation_samples=0"]
        assert main(arguments(made, tmp_path, *more)) == 0
        scores = json.loads((tmp_path / "steered" / "scores.json").read_text())["scores"]
        found = {one["task"]: one["scores"] for one in scores}
        assert found["ac"]["judge"]["value"] == pytest.approx(20)
        assert found["er"]["judge_binary"]["value"] == pytest.approx(100)
        assert "judge" not in found["asr"]
        asked = len(server.requests)
        assert main(arguments(made, tmp_path, *more)) == 0
        assert len(server.requests) == asked, "verdicts are kept"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret-4711" in path.read_bytes()]


def refused(arguments: list[str], capfd) -> tuple[int, str]:
    code = main(arguments)
    return code, capfd.readouterr().err


def test_a_missing_encoder_is_named_and_nothing_is_written(made, ray_cluster, tmp_path, capfd):
    broken = export_to(tmp_path / "broken", steered_model(PER_TASK))
    weights = load_file(broken / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".pool.members.2." not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    code, said = refused([str(broken), *arguments(made, tmp_path / "out")[1:]], capfd)
    assert code == 1
    assert "the weak encoder hubert_two" in said
    assert not (tmp_path / "out").exists()


def test_samples_without_an_answer_are_refused(made, ray_cluster, tmp_path, capfd):
    rows = [{"audio": "a.wav", "instruction": "What?", "task": "aqa", "duration": 1.0}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f"data.validation.0.path={tmp_path / 'rows.jsonl'}"]
    code, said = refused([*arguments(made, tmp_path / "out"), *more], capfd)
    assert code == 1
    assert "no_answer" in said
    assert not (tmp_path / "out").exists()


def test_a_missing_audio_file_is_counted_or_ends_it(made, ray_cluster, tmp_path, capfd):
    samples = tone_samples(6)
    for sample in samples:
        (tmp_path / f"{sample.id}.flac").write_bytes(sample.audio or b"")
    rows = [{"audio": f"{s.id}.flac", "instruction": s.instruction, "answer": s.answer, "task": s.task, "duration": 1.0}
            for s in samples]  # fmt: skip
    rows.append({**rows[0], "audio": "gone.flac"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f"data.validation.0.path={tmp_path / 'rows.jsonl'}", "ablation_samples=0"]
    code, said = refused([*arguments(made, tmp_path / "out"), *more], capfd)
    assert code == 1
    assert "1 of 7 samples" in said
    assert "data.max_bad_fraction" in said
    assert not list(tmp_path.rglob("scores.json"))
    assert main([*arguments(made, tmp_path / "out"), *more, "data.max_bad_fraction=0.2"]) == 0
    scores = json.loads((tmp_path / "out" / "steered" / "scores.json").read_text())
    assert sum(scores["bad"]["validation"].values()) == 1


def test_samples_that_name_no_task_are_refused(made, ray_cluster, tmp_path, capfd):
    write_webdataset([replace(sample, task="") for sample in tone_samples(4)], str(tmp_path / "nameless"))
    more = [f"data.validation.0.path={tmp_path / 'nameless'}"]
    code, said = refused([*arguments(made, tmp_path / "out"), *more], capfd)
    assert code == 2
    assert "data.validation.0.task: nothing says the task of 4 of 4 samples" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.validation.0.metrics=[werr]"], "data.validation.0.metrics: 'werr' is no metric, did you mean wer?"),
        (["generation.beams=2"], "generation.beams: unknown key (did you mean generation.num_beams?)"),
        (["judge.base_url=http://localhost:1"], "judge.model: is needed with judge.base_url"),
        (["baseline=nobody"], "baseline: there is no model 'nobody', only steered"),
    ],
)
def test_wrong_requests_stop_before_anything_starts(made, tmp_path, capfd, more, message):
    code, said = refused([*arguments(made, tmp_path / "out"), *more], capfd)
    assert code == 2
    assert message in said
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused(tmp_path, capfd):
    assert refused([str(tmp_path / "nothing")], capfd) == (
        2,
        f"{tmp_path / 'nothing'} is neither a run nor an export: it has no config.json\n",
    )
    (tmp_path / "config.json").write_text("{}")
    assert "a run without an export" in refused([str(tmp_path)], capfd)[1]
