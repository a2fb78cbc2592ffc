"""Runs that read from S3 and write to S3 alone: a local server, slow, that refuses requests and breaks connections."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from mowe_ray.output.run_folder import RunFolder
from tests.end_to_end import Finished, run_command
from tests.s3_server import BUCKET, S3Server, make_bucket
from tests.tiny_runs import Corpus, tiny_arguments, write_corpus
from tests.tiny_sweeps import write_sweep

pytestmark = pytest.mark.slow
URL = f"s3://{BUCKET}"
SETTINGS = ["--config", "quickstart", "training.save_every=3", "training.eval_every=6", "training.log_samples=true"]
# Of the requests for data and records, those that fail: more in a row than clients try again by themselves.
DATA = rf"(GET|PUT) /{BUCKET}/.*(tar|metrics|samples)"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        make_bucket()
        yield running


@pytest.fixture
def corpus(server: S3Server, tmp_path: Path) -> Corpus:
    """The tiny corpus, in the bucket; also at `tmp_path / "corpus"`."""
    write_corpus(tmp_path / "corpus")
    fsspec.filesystem("s3", skip_instance_cache=True).put(str(tmp_path / "corpus"), f"{BUCKET}/corpus", recursive=True)
    return Corpus(f"{URL}/corpus/train", f"{URL}/corpus/validation")  # type: ignore[arg-type]


def _run(corpus: Corpus, name: str, steps: int, *settings: str) -> Finished:
    tiny = tiny_arguments(corpus, f"{URL}/runs", name)  # type: ignore[arg-type]
    return run_command(*SETTINGS, *tiny, f"training.max_steps={steps}", *settings)


def test_a_run_from_s3_to_s3_loses_nothing_to_faults(server: S3Server, corpus: Corpus) -> None:
    name = f"run-{uuid4().hex[:6]}"
    server.faults.latency_s, server.faults.only, server.faults.rate = 0.01, DATA, 0.05
    server.faults.fail(12, 503)
    done = _run(corpus, name, 2)
    assert done.code == 0, done.err
    assert done.result["samples"] == {"lost": 0, "repeated": 0}
    folder = RunFolder(f"{URL}/runs", name)
    assert folder.read_json("data_report.json")["bad_samples"] == []
    assert [r["step"] for r in folder.read_records("metrics.jsonl") if r["kind"] == "train"] == [1, 2]
    assert folder.exists("export/model.safetensors")


def test_a_server_knows_nothing_of_the_one_before(server: S3Server) -> None:
    assert fsspec.filesystem("s3", skip_instance_cache=True).ls(BUCKET) == []


@pytest.mark.soak  # four commands
def test_a_run_that_resumes_on_s3_equals_one_on_a_disk(server: S3Server, corpus: Corpus, tmp_path: Path) -> None:
    name = f"run-{uuid4().hex[:6]}"
    server.faults.latency_s, server.faults.only, server.faults.rate = 0.01, DATA, 0.05
    assert (first := _run(corpus, name, 3)).code == 0, first.err
    server.faults.fail(12, "reset")
    resumed = _run(corpus, name, 6)
    assert resumed.code == 0, resumed.err
    assert "continuing after step 3" in resumed.err
    assert resumed.result["samples"] == {"lost": 0, "repeated": 0}
    folder = RunFolder(f"{URL}/runs", name)
    assert [r["step"] for r in folder.read_records("metrics.jsonl") if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]

    local = Corpus(tmp_path / "corpus" / "train", tmp_path / "corpus" / "validation")
    whole = run_command(*SETTINGS, *tiny_arguments(local, tmp_path / "runs", name), "training.max_steps=6")
    assert whole.code == 0, whole.err
    export = folder.read_bytes("export/model.safetensors")
    assert export == (tmp_path / "runs" / name / "export" / "model.safetensors").read_bytes()

    scored = run_command(folder.url, "generation.max_new_tokens=2", module="mowe_ray.evaluate")
    assert scored.code == 0, scored.err
    assert len(folder.read_lines("evaluation/predictions/held_out.jsonl")) == 10
    assert json.loads(folder.read_text("evaluation/scores.json"))


@pytest.mark.soak  # two commands
def test_features_at_a_url_are_computed_once(server: S3Server, corpus: Corpus) -> None:
    settings = ("model.train_base=frozen", f"data.feature_cache={URL}/cache")
    one, other = f"run-{uuid4().hex[:6]}", f"run-{uuid4().hex[:6]}"
    first = _run(corpus, one, 2, *settings)
    assert first.code == 0, first.err
    before = len(server.faults.requests)
    second = _run(corpus, other, 2, *settings)
    assert second.code == 0, second.err
    assert not [request for request in server.faults.requests[before:] if request.startswith(f"PUT /{BUCKET}/cache")]
    exports = [RunFolder(f"{URL}/runs", name).read_bytes("export/model.safetensors") for name in (one, other)]
    assert exports[0] == exports[1]


@pytest.mark.soak  # a study of two runs
def test_a_study_from_s3_to_s3(server: S3Server, corpus: Corpus, tmp_path: Path) -> None:
    server.faults.latency_s, server.faults.only, server.faults.rate = 0.01, DATA, 0.05
    space = {"model.router.top_k": {"choice": [1, 2]}}
    tiny = {"training.max_steps": 2, "training.eval_every": 2}
    keys = {"name": f"study-{uuid4().hex[:6]}", "storage": f"{URL}/studies", "space": space, "set": tiny}
    sweep = write_sweep(tmp_path, corpus, search={"kind": "grid"}, **keys)
    done = run_command(sweep, module="mowe_ray.sweep", timeout_s=480)
    assert done.code == 0, done.err
    folder = RunFolder(f"{URL}/studies", str(keys["name"]))
    assert folder.read_text("results.csv").count("finished") == 2
    assert folder.exists("report.html")
    assert folder.exists("best.yaml")
