"""Questions from the terminal, to a model and to a server; and a model in two parts."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mowe_ray.ask import main
from mowe_ray.export import main as export
from tests.end_to_end import encoded
from tests.exported_models import export_to, steered_model, task_sound
from tests.serving import Served, serving

FEW = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    export_to(folder / "tiny", steered_model(2))
    for number in (0, 1):
        (folder / f"clip{number}.flac").write_bytes(encoded(task_sound(number, 0, 2)))
    (folder / "text.wav").write_text("hello")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving({"tiny": steered_model(2)}, token="secret") as server:
        yield server


def asked(*words: str | Path) -> tuple[int, list[str]]:
    out = io.StringIO()
    return main([str(word) for word in words], out), out.getvalue().splitlines()


@pytest.mark.slow
def test_a_model_and_a_server_answer_alike(folder: Path, server: Served) -> None:
    clips = (folder / "clip0.flac", folder / "clip1.flac")
    code, lines = asked(folder / "tiny", *clips, "Alike?", *FEW)
    assert (code, len(lines)) == (0, 1)
    remote = ["--url", f"{server.url}/v1", "--api-key", "secret"]
    assert asked(*remote, *clips, "Alike?", *FEW) == (0, lines)
    assert asked(*remote, "--model", "tiny", "Alike?", *clips, *FEW) == (0, lines)
    without = ["--json", "--without", "hubert_one", *FEW]
    (one,), (two,) = asked(folder / "tiny", *clips, "?", *without)[1], asked(*remote, *clips, "?", *without)[1]
    assert json.loads(one)["answer"] == json.loads(two)["answer"]
    assert json.loads(one)["mowe"]["clips"][0]["ran"] == json.loads(two)["mowe"]["clips"][0]["ran"]
    assert "hubert_one" not in json.loads(one)["mowe"]["clips"][1]["ran"]


@pytest.mark.slow
def test_without_a_question_each_line_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n\nWhy?\n"))
    code, lines = asked(folder / "tiny", folder / "clip0.flac", "--json", *FEW)
    assert code == 0
    assert [json.loads(line)["question"] for line in lines] == ["What?", "Why?"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a run, an export, or a server"),
        (["nowhere", "?"], "neither a run nor an export"),
        (["tiny", "missing.wav", "?"], "no file 'missing.wav'"),
        (["tiny", "clip0.flac", "What is", "it?"], "two questions"),
        (["tiny", "text.wav", "?"], "not an audio file, but text: send wav"),
        (["--url", "http://127.0.0.1:9/v1", "?"], "does not answer"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, capsys, monkeypatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(folder)
    assert asked(*words) == (2, [])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_export_splits_into_a_new_folder_only(folder: Path, tmp_path: Path, capsys) -> None:
    (folder / "tiny" / "README.md").write_text("# tiny\n\nWords.\n")
    assert export([str(folder / "tiny"), "--split", str(tmp_path / "parts")]) == 0
    assert "# tiny: llm" in (tmp_path / "parts" / "llm" / "README.md").read_text()
    assert "# tiny: front" in (tmp_path / "parts" / "front" / "README.md").read_text()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (Path(result["llm"]) / "config.json").exists()
    assert (Path(result["front"]) / "prompt_embeddings.py").exists()
    assert export([str(folder / "tiny"), "--split", str(tmp_path / "parts")]) == 2
    assert "is not empty" in capsys.readouterr().err
