"""`prepare` took the names of folders for the answers although a table beside the clips held them ("train").

Reports: huggingface/datasets#4311 and #7880.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.registry import detect_kind, read_source
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.prepare import main
from tests.read_source import CLIP
from tests.tiny_corpora import put

TEXTS = {"0": "first sentence", "1": "second sentence"}


def table(form: str, folder: str = "") -> bytes:
    rows = [{"file_name": f"{folder}{name}.wav", "transcription": text} for name, text in TEXTS.items()]
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if form == "csv":
        return b"file_name,transcription\n" + "".join(",".join(row.values()) + "\n" for row in rows).encode()
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()


def put_clips(folder: Path, *names: str) -> None:
    for name in names or TEXTS:
        put(folder / f"{name}.wav", CLIP)


def read(folder: Path, split: str | None = None) -> list[Sample | BadSample]:
    return list(read_source(folder, detect_kind(folder), Defaults("corpus", task="asr"), split))


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("nested", [True, False])
def test_the_table_holds_the_answers(tmp_path: Path, form: str, nested: bool) -> None:
    put_clips(tmp_path / "train")
    put(tmp_path / ("train" if nested else "") / f"metadata.{form}", table(form, "" if nested else "train/"))
    assert [sample.answer for sample in read(tmp_path) if isinstance(sample, Sample)] == list(TEXTS.values())


def test_one_split_at_a_time(tmp_path: Path) -> None:
    for split in ("train", "test"):
        put_clips(tmp_path / split)
        put(tmp_path / split / "metadata.jsonl", table("jsonl"))
    with pytest.raises(ValueError, match="--split is needed"):
        read(tmp_path)
    assert [sample.id for sample in read(tmp_path, "test")] == ["test/0", "test/1"]


def test_clips_without_a_row_and_rows_without_a_clip_are_counted(tmp_path: Path) -> None:
    put_clips(tmp_path, "0", "2", "._0")
    put(tmp_path / "metadata.csv", table("csv"))
    found = read(tmp_path)
    assert [sample.id for sample in found if isinstance(sample, Sample)] == ["0"]
    assert [(sample.id, sample.cause) for sample in found if isinstance(sample, BadSample)] == [
        ("1", "no_audio"),
        ("2.wav", "no_answer"),
    ]


@pytest.mark.parametrize(
    ("other", "content"),
    [
        ("metadata.csv", "0.wav|first sentence\n1.wav|second sentence\n"),
        ("meta/esc50.csv", "filename,fold,target\n"),
        ("transcripts.tsv", "file\ttext\n"),
        ("wavs/0.txt", "first sentence"),
        ("wavs/1.json", "{}"),
        ("transcripts.txt", "0 first sentence\n1 second sentence\n"),
        ("list.txt", "wavs/0.wav|first sentence\n"),
        ("notes/readme.md", ""),  # all labels would be the same
    ],
)
def test_no_answer_is_guessed_where_something_else_may_hold_it(
    tmp_path: Path, capsys, other: str, content: str
) -> None:
    put_clips(tmp_path / "corpus" / "wavs")
    put(tmp_path / "corpus" / other, content)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "corpus"), "--task", "asr", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "manifest" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--kind", "folders"], ["--label-from", "folder"]])
def test_who_says_that_folders_are_answers_is_believed(tmp_path: Path, capsys, arguments: list[str]) -> None:
    put_clips(tmp_path / "corpus" / "tone")
    put(tmp_path / "corpus" / "notes.csv", "x\n")
    assert main([str(tmp_path / "corpus"), "--task", "er", "--out", str(tmp_path / "out"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 2


@pytest.mark.slow
def test_folders_of_several_labels_need_no_word(tmp_path: Path, capsys) -> None:
    put_clips(tmp_path / "corpus" / "happy", "0")
    put_clips(tmp_path / "corpus" / "sad", "1")
    put(tmp_path / "corpus" / "LICENSE.txt", "free to use")
    put(tmp_path / "corpus" / "testing_list.txt", "happy/0.wav\nsad/1.wav\n")
    assert main([str(tmp_path / "corpus"), "--task", "er", "--out", str(tmp_path / "out")]) == 0


def test_one_bad_row_of_a_table_costs_one_row(tmp_path: Path) -> None:
    put_clips(tmp_path, "0", "1")
    rows = [
        {"audio_file_name": "0.wav", "text": "one"},
        {"text": "no name"},
        {"file_name": "x/../1.wav", "text": "two"},
    ]
    put(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    found = read(tmp_path)
    assert [sample.answer for sample in found if isinstance(sample, Sample)] == ["one", "two"]
    assert [sample.cause for sample in found if isinstance(sample, BadSample)] == ["unreadable", "unreadable"]


@pytest.mark.slow
def test_labelled_folders_of_several_splits_are_not_mixed(tmp_path: Path, capsys) -> None:
    for split in ("train", "test"):
        put_clips(tmp_path / "corpus" / split / "happy", "0")
        put_clips(tmp_path / "corpus" / split / "sad", "1")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "corpus"), "--task", "er", "--out", str(tmp_path / "out")])
    assert "name one of them" in capsys.readouterr().err
    assert main([str(tmp_path / "corpus" / "train"), "--task", "er", "--out", str(tmp_path / "out")]) == 0
