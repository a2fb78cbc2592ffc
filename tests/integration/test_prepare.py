"""`python -m mowe_ray.prepare`, from published layouts to shards that the training side reads."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.shards import list_shards, scan_shard
from mowe_ray.prepare import main
from tests.layouts import ANSWERS, CLIPS, LAYOUTS, QUESTION


def _audio(pitch=440, seconds=0.4, scale=0.5, container="FLAC"):
    time = np.arange(int(seconds * 16_000)) / 16_000
    file = io.BytesIO()
    soundfile.write(file, scale * np.sin(2 * np.pi * pitch * time), 16_000, format=container)
    return file.getvalue()


def _run(capsys, *arguments):
    """Exit code, last line on stdout as JSON, and stderr."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    return code, json.loads(lines[-1]) if lines else None, printed.err


def _rows(folder):
    return [r for shard in list_shards(str(folder)) for r in scan_shard(shard).to_pylist()]


def _manifest(root):
    rows = [{"audio": f"{n}.flac", "text": f"word {n}"} for n in range(6)]
    for n in range(6):
        (root / f"{n}.flac").write_bytes(_audio(300 + n))
    (root / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "m.jsonl"


def _parquet(root):
    rows = [{"audio": {"bytes": _audio(300 + n), "path": None}, "text": f"{n}"} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), root / "train-0.parquet")
    return root


def _audiobench(root):
    rows = [{"context": {"bytes": _audio(300 + n)}, "instruction": "Who?", "answer": f"{n}"} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), root / "a.parquet")
    return root


def _librispeech(root):
    (root / "dev" / "1" / "2").mkdir(parents=True)
    for n in range(6):
        (root / "dev" / "1" / "2" / f"1-2-{n}.flac").write_bytes(_audio(300 + n))
    lines = "".join(f"1-2-{n} WORD\n" for n in range(6))
    (root / "dev" / "1" / "2" / "1-2.trans.txt").write_text(lines)
    return root


def _folders(root):
    for n in range(6):
        (root / f"label {n % 2}").mkdir(exist_ok=True)
        (root / f"label {n % 2}" / f"{n}.flac").write_bytes(_audio(300 + n))
    return root


@pytest.mark.parametrize("shards", ["webdataset", "parquet"])
@pytest.mark.parametrize("layout", [_manifest, _parquet, _audiobench, _librispeech, _folders])
def test_every_layout_is_recognised_and_becomes_both_formats(tmp_path, capsys, layout, shards):
    (tmp_path / "source").mkdir()
    source, out = layout(tmp_path / "source"), tmp_path / "out"
    code, result, _ = _run(capsys, source, "--task", "asr", "--out", out, "--format", shards)
    assert code == 0
    assert result == {"samples": 6, "shards": 1, "hours": 0.0007, "bad": 0, "out": str(out)}
    rows = _rows(out)
    assert len({row["id"] for row in rows}) == 6
    assert {row["task"] for row in rows} == {"asr"}
    assert all(row["cause"] is None and row["duration_s"] == pytest.approx(0.4) for row in rows)


def test_builtin_in_small_shards(tmp_path, capsys):
    arguments = ["builtin", "--split", "validation", "--clips", 20, "--shard-size-mb", 0.2]
    code, result, _ = _run(capsys, *arguments, "--out", tmp_path)
    assert code == 0
    assert result["samples"] == 20
    assert result["shards"] >= 2
    assert len(_rows(tmp_path)) == 20


def test_bad_clips_are_left_out_counted_and_listed(tmp_path, capsys):
    manifest = _manifest(tmp_path)
    (tmp_path / "0.flac").write_bytes(b"")
    (tmp_path / "1.flac").write_bytes(b"this is text, not sound " * 20)
    (tmp_path / "2.flac").write_bytes(_audio(scale=0))
    (tmp_path / "3.flac").unlink()
    (tmp_path / "4.flac").write_bytes(_audio(seconds=2, container="WAV")[:20_000])
    code, result, errors = _run(capsys, manifest, "--task", "asr", "--out", tmp_path / "out")
    assert code == 0
    assert (result["samples"], result["bad"]) == (1, 5)
    assert (
        f"left out 5, such as 0.flac: zero_length: empty file; all are listed in {tmp_path}/out/data_report" in errors
    )
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    causes = report["sources"]["m"]["causes"]
    assert causes == dict.fromkeys(("zero_length", "wrong_type", "silent", "no_audio", "truncated"), 1)
    assert {bad["id"] for bad in report["bad_samples"]} == {f"{n}.flac" for n in range(5)}


def test_nothing_usable_ends_with_1(tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text('{"audio": "gone.wav", "text": "x"}')
    arguments = [tmp_path / "m.jsonl", "--task", "asr", "--out", tmp_path / "out"]
    code, result, errors = _run(capsys, *arguments)
    assert (code, result["samples"], result["bad"]) == (1, 0, 1)
    assert "no usable sample" in errors


def test_held_out_clips_are_disjoint_complete_and_stable(tmp_path, capsys):
    found = []
    for name in ("a", "b"):
        out = tmp_path / name
        code, result, _ = _run(capsys, "builtin", "--clips", 40, "--validation-fraction", 0.3, "--out", out)
        assert code == 0
        sides = [{row["id"] for row in _rows(out / side)} for side in ("train", "validation")]
        assert [result["splits"][s]["samples"] for s in ("train", "validation")] == [len(side) for side in sides]
        assert not sides[0] & sides[1]
        assert len(sides[0] | sides[1]) == result["samples"] == 40
        found.append(sides)
    assert found[0] == found[1]


def test_a_folder_with_content_is_left_alone_unless_told(tmp_path, capsys):
    (tmp_path / "00000.tar").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["builtin", "--clips", 5, "--format", "parquet", "--out", tmp_path]
    code, _, errors = _run(capsys, *arguments)
    assert code == 2
    assert "--overwrite" in errors
    assert (tmp_path / "00000.tar").read_bytes() == b"old"
    assert _run(capsys, *arguments, "--overwrite")[0] == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000.parquet", "_index", "data_report.json", "notes.txt", "prepared.json"]


def test_a_source_that_cannot_be_read_replaces_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert _run(capsys, "builtin", "--clips", 5, "--out", out)[0] == 0
    (tmp_path / "source").mkdir()
    source = _manifest(tmp_path / "source")
    code, _, errors = _run(capsys, source, "--out", out, "--overwrite")
    assert code == 2
    assert "--task" in errors
    assert len(_rows(out)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "does not exist"),
        (["builtin", "--clips", "0"], "--clips"),
        (["builtin", "--clips", "many"], "--clips"),
        (["builtin", "--validation-fraction", "1"], "--validation-fraction"),
        (["builtin", "--task", "asr"], "--task"),
        (["builtin", "--split", "test"], "--split"),
        (["builtin", "--label-from", "stem"], "--label-from"),
        (["builtin", "--seed", "-1"], "--seed"),
        (["builtin", "--min-duration", "9", "--max-duration", "1"], "--max-duration"),
        (["builtin", "--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_arguments_end_with_2_and_are_named(tmp_path, capsys, arguments, message):
    code, result, errors = _run(capsys, *arguments, "--out", tmp_path / "out")
    assert (code, result) == (2, None)
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_shards_never_lie_inside_their_source(tmp_path, capsys):
    source = _parquet(tmp_path)
    code, _, errors = _run(capsys, source, "--task", "asr", "--out", tmp_path / "shards")
    assert code == 2
    assert "inside SOURCE" in errors


def test_the_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "mowe_ray.prepare", "builtin", "--clips", "5", "--out"]
    done = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["samples"] == 5
    assert "preparing" in done.stderr


@pytest.mark.parametrize("name", ["csv", "ms_swift", "nemo_tarred", "lhotse_shar", "wav_and_txt", "webdataset_cls"])
def test_what_training_reads_as_it_is_prepare_reads_too(tmp_path, capsys, name):
    (tmp_path / "source").mkdir()
    source = LAYOUTS[name](tmp_path / "source")
    instruction = ["--instruction", QUESTION] if "instruction" in source else []
    out = tmp_path / "out"
    code, result, _ = _run(capsys, source["path"], "--task", "aqa", *instruction, "--out", out)
    assert (code, result["samples"], result["bad"]) == (0, CLIPS, 0)
    batch = load_micro_batch(build_index([SourceSpec("s", str(out))], tmp_path, min_s=0.1, max_s=30).table, 0.1, 30)
    assert batch.instructions == [QUESTION] * CLIPS
    wanted = [str(int(answer == "high")) if name == "webdataset_cls" else answer for answer in ANSWERS]
    assert batch.answers == wanted


def test_columns_of_another_name_and_conversations(tmp_path, capsys):
    (tmp_path / "0.flac").write_bytes(_audio())
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a tone"}]
    turns += [{"role": "user", "content": "Is it <audio> or <audio>?"}, {"role": "assistant", "content": "the first"}]
    rows = [{"dialog": turns, "sounds": ["0.flac", "0.flac"], "kind": "chat"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ["messages=dialog", "audio=sounds", "task=kind"]
    code, result, _ = _run(capsys, tmp_path / "m.jsonl", "--columns", *columns, "--out", tmp_path / "out")
    assert (code, result["samples"]) == (0, 1)
    (found,) = _rows(tmp_path / "out")
    assert (found["clips"], found["turns"], found["task"]) == (2, 2, "chat")
    code, _, errors = _run(capsys, tmp_path / "m.jsonl", "--columns", "sound=sounds", "--out", tmp_path / "other")
    assert code == 2
    assert "--columns takes FIELD=NAME, of the fields id, audio" in errors
