"""A power cut or a full disk left damaged small files; the next start said "Expecting value: line 1 column 1".

A line of NULs is what ext4 and XFS leave of an append that was not synced. Report: dbolya/yolact#710.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mowe_ray.config import load_config
from mowe_ray.config.data_section import DataSection
from mowe_ray.config.schema import TrackingSection
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.distributed.ray_train.driver import _claim
from mowe_ray.evaluation.judge.judge import _Judgements
from mowe_ray.evaluation.predictions import Answer, Predictions
from mowe_ray.evaluation.targets import find_models
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.sweeping.trials import history, load_all
from mowe_ray.training.datasets import scan_sources
from mowe_ray.training.tracker import Tracker
from tests.read_source import CLIP, note, write_tar

NULS = "\0" * 100 + "\n"


def line(step: int, kind: str = "train") -> str:
    return json.dumps({"kind": kind, "step": step, "lm_loss": 1.0, "routing": {}, "loss": 1.0, "tasks": {}}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path), "run")


@pytest.mark.parametrize("damage", [NULS, "\n", '{"step": 1\n', "\udcff\n", '{"loss": 1}\n', "[1]\n", "7\n", "\0" * 20])
def test_damaged_metrics_cost_their_line(folder: RunFolder, damage: str) -> None:
    content = line(1) + damage + line(2) + line(3, "validation") + line(9) + '{"half'
    (Path(folder.url)).mkdir()
    Path(folder.url, "metrics.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    known = [1, 2, 3, 9] if damage.endswith("\n") else [1, 3, 9]  # without its end, it takes the next line along
    assert [record["step"] for record in folder.read_records("metrics.jsonl", "kind", "step")] == known
    assert history(folder).train_loss == [(step, 1.0) for step in known if step != 3]
    folder.write_text("export/config.json", "{}")
    assert [record["step"] for record in find_models([folder.url])[0].history] == [step for step in known if step != 3]
    said: list[str] = []
    tracker = Tracker(
        folder,
        name="run",
        config={},
        resume_step=3,
        tracking=TrackingSection(),
        warn=said.append,
    )
    tracker.log({"kind": "train", "step": 4})
    assert [record["step"] for record in tracker.records()] == [*known[:-1], 4]
    assert said == [f"warning: {folder.path('metrics.jsonl')} is damaged in line 2, which is left out"]


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b'{"a": ', b"\xff\xfe", b"[" * 200_000], ids=range(5))
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("config.json", lambda folder: find_models([folder.url])),
        ("config.json", lambda folder: _claim(folder, load_config("quickstart"))),
    ],
)
def test_a_damaged_file_is_named(
    folder: RunFolder, file: str, read: Callable[[RunFolder], object], content: bytes
) -> None:
    folder.write_text("export/config.json", "{}")
    folder.write_bytes(file, content)
    with pytest.raises(ValueError, match=r"remove it$") as error:
        read(folder)
    assert folder.path(file) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b'{"a": ', b"\xff\xfe", b"[" * 200_000, b"[]"], ids=range(6))
def test_a_study_goes_on_beside_damaged_files(folder: RunFolder, content: bytes) -> None:
    folder.write_bytes("trial-0001/trial.json", content)
    folder.write_bytes("router_report.json", content)
    said: list[str] = []
    assert load_all(folder, said.append) == []
    assert [folder.path("trial-0001/trial.json") in line for line in said] == [True]
    assert not history(folder).routing


def test_a_run_with_a_damaged_result_ends_once_more(folder: RunFolder) -> None:
    said: list[str] = []
    for content in (b"", b"\0" * 64, b"{", b"[]"):
        folder.write_bytes("result.json", content)
        assert folder.find_json("result.json", "steps", warn=said.append) is None
    assert all(line.startswith(f"warning: {folder.path('result.json')} is damaged") for line in said)
    folder.write_json("result.json", {"steps": 3})
    assert folder.find_json("result.json", "steps", warn=pytest.fail) == {"steps": 3}
    assert folder.find_json("result.json", "tasks", warn=said.append) is None
    assert folder.find_json("no.json", warn=pytest.fail) is None


@pytest.mark.parametrize("file", ["p.jsonl", "p.steps.jsonl"])
def test_answers_behind_the_damage_are_answered_again(folder: RunFolder, file: str) -> None:
    predictions = Predictions(folder, "p", {"seed": 0})
    predictions.begin()
    for number in range(3):
        predictions.add([Answer(str(number), "asr", "?", "yes", ["yes"])], [], audio_s=1.0, seconds=1.0)
    lines = folder.read_lines(file)
    for number in range(len(lines)):
        folder.write_text(file, "".join([*lines[:number], NULS, *lines[number + 1 :]]))
        again = Predictions(folder, "p", {"seed": 0})
        assert again.finished == max(0, number - (file == "p.steps.jsonl"))
        assert [answer.id for answer in again.answers()] == ["0", "1", "2"][: again.finished]
        folder.write_text(file, "".join(lines))


def test_judgements_beside_the_damage_are_kept(folder: RunFolder) -> None:
    lines = [json.dumps({"key": key, "id": key, "reply": "5"}) + "\n" for key in "abc"]
    folder.write_text("j.jsonl", lines[0] + NULS + lines[2] + '{"key"')
    judgements = _Judgements(folder, "j.jsonl")
    judgements.add("d", "d", "4")
    assert _Judgements(folder, "j.jsonl").replies == {"a": "5", "c": "5", "d": "4"}


@pytest.mark.parametrize("left", [0, 10, 0.5, -1])
def test_a_cut_index_is_built_again(tmp_path: Path, left: float) -> None:
    source = [SourceSpec("s", str(write_tar(tmp_path / "a.tar", ("a.wav", CLIP), ("a.json", note()))))]
    before = build_index(source, tmp_path / "cache", min_s=0.1, max_s=30.0)
    [cache] = (tmp_path / "cache").iterdir()
    whole = cache.read_bytes()
    cache.unlink()  # what is mapped into memory must not change
    cache.write_bytes(whole[: int(len(whole) * left) if left == 0.5 else int(left)])
    after = build_index(source, tmp_path / "cache", min_s=0.1, max_s=30.0)
    assert after.table.equals(before.table)
    assert cache.read_bytes() == whole


def test_a_full_folder_of_caches_costs_the_cache(small_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tars = tmp_path_factory.mktemp("tars")
    source = [SourceSpec("s", str(write_tar(tars / "a.tar", ("a.wav", CLIP), ("a.json", note()))))]
    with (small_disk / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
        while rest.write(bytes(4096)):
            pass
    with pytest.warns(UserWarning, match=f"{small_disk} cannot keep the scan of {tars}/a.tar.*No space"):
        assert len(build_index(source, small_disk, min_s=0.1, max_s=30.0)) == 1
    assert [file.name for file in small_disk.iterdir()] == ["rest"]


def test_a_folder_of_caches_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mowe_ray").write_text("a file, where even root can make no folder")
    source = [SourceSpec("s", str(write_tar(tmp_path / "a.tar", ("a.wav", CLIP), ("a.json", note()))))]
    with pytest.warns(UserWarning, match="cannot keep the scan"):
        assert len(build_index(source, tmp_path / "mowe_ray", min_s=0.1, max_s=30.0)) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"builtin:train cannot be written to .*XDG_CACHE_HOME"):
        scan_sources(DataSection.model_validate({"train": [{"path": "builtin:train"}]}))


@pytest.mark.slow
def test_what_must_last_reaches_the_disk_before_its_name(tmp_path: Path) -> None:
    """Without the sync, a power cut leaves the name of a new file without its content."""
    script = (
        "from mowe_ray.output.run_folder import RunFolder\n"
        f"folder = RunFolder({str(tmp_path)!r}, 'run')\n"
        "folder.write_json('config.json', {})\n"
        "folder.append_text('metrics.jsonl', 'x')\n"
    )
    traced = tmp_path / "calls"
    watch = f"import os, sys\nopen_, sync, rename = os.open, os.fsync, os.replace\ncalls = open({str(traced)!r}, 'w')\n"
    watch += "os.fsync = lambda fd: (calls.write(os.readlink(f'/proc/self/fd/{fd}') + '\\n'), sync(fd))\n"
    watch += "os.replace = lambda a, b: (calls.write(f'rename {b}\\n'), rename(a, b))\n"
    subprocess.run([sys.executable, "-c", watch + script], check=True, env=os.environ)
    run = tmp_path / "run"
    assert re.sub(r"[0-9a-f]{32}", "*", traced.read_text()).splitlines() == [
        f"{run}/config.json.*.part",
        f"rename {run}/config.json",
        str(run),
        f"{run}/metrics.jsonl",
    ]
