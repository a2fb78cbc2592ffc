"""Runs that read from S3 and write to S3 alone: a local server, slow, that refuses requests and breaks connections."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from mowe_ray.output.run_folder import RunFolder
from tests.end_to_end import run_command
from tests.s3_server import BUCKET, S3Server, make_bucket
from tests.tiny_runs import Corpus, tiny_arguments, write_corpus

pytestmark = pytest.mark.slow
# Of the requests for data and records, those that fail: more in a row than clients try again by themselves.
DATA = rf"(GET|PUT) /{BUCKET}/.*(tar|metrics|samples)"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        make_bucket()
        yield running


def test_a_run_from_s3_to_s3_equals_one_on_a_disk(server: S3Server, tmp_path: Path) -> None:
    local = write_corpus(tmp_path / "corpus")
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.put(str(tmp_path / "corpus"), f"{BUCKET}/corpus", recursive=True)
    url = f"s3://{BUCKET}"
    corpus, name = Corpus(f"{url}/corpus/train", f"{url}/corpus/validation"), f"run-{uuid4().hex[:6]}"  # type: ignore[arg-type]
    settings = ["--config", "quickstart", "training.save_every=3", "training.eval_every=6", "training.log_samples=true"]

    server.faults.latency_s, server.faults.only, server.faults.rate = 0.01, DATA, 0.05
    run = [*settings, *tiny_arguments(corpus, f"{url}/runs", name)]  # type: ignore[arg-type]
    server.faults.fail(12, 503)
    first = run_command(*run, "training.max_steps=3")
    assert first.code == 0, first.err
    server.faults.fail(12, "reset")
    resumed = run_command(*run, "training.max_steps=6")
    assert resumed.code == 0, resumed.err
    assert "continuing after step 3" in resumed.err
    assert resumed.result["samples"] == {"lost": 0, "repeated": 0}
    folder = RunFolder(f"{url}/runs", name)
    assert folder.read_json("data_report.json")["bad_samples"] == []
    assert [r["step"] for r in folder.read_records("metrics.jsonl") if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]

    whole = run_command(*settings, *tiny_arguments(local, tmp_path / "runs", name), "training.max_steps=6")
    assert whole.code == 0, whole.err
    export = folder.read_bytes("export/model.safetensors")
    assert export == (tmp_path / "runs" / name / "export" / "model.safetensors").read_bytes()

    scored = run_command(folder.url, "generation.max_new_tokens=2", module="mowe_ray.evaluate")
    assert scored.code == 0, scored.err
    assert len(folder.read_lines("evaluation/predictions/held_out.jsonl")) == 10
    assert json.loads(folder.read_text("evaluation/scores.json"))
