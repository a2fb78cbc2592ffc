from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from mowe_ray.output.run_folder import RunFolder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path) if request.param == "local" else f"memory://{uuid4()}", "run")


def test_files_are_written_read_and_appended(folder):
    assert not folder.exists()
    assert not folder.exists("a/b.txt")
    folder.write_text("a/b.txt", "één\n")
    folder.append_text("a/b.txt", "two\n")
    folder.append_text("new.txt", "one\n")
    folder.write_json("c.json", {"x": 1})
    assert folder.exists()
    assert folder.read_lines("a/b.txt") == ["één\n", "two\n"]
    assert folder.read_lines("new.txt") == ["one\n"]
    assert folder.read_text("c.json") == '{\n  "x": 1\n}\n'
    folder.write_bytes("c.json", b"again")
    assert folder.read_text("c.json") == "again"
    assert not folder.exists("c.json.part")


def test_lines_of_later_steps_and_half_lines_are_dropped(folder):
    folder.keep_lines_up_to("x.jsonl", 2)
    assert folder.read_text("x.jsonl") == "", "there is a file, if only an empty one"
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 2, 3)]
    folder.append_text("x.jsonl", "".join(lines) + '{"step": 1')
    folder.keep_lines_up_to("x.jsonl", 2)
    assert folder.read_text("x.jsonl") == "".join(lines[:3])
    assert folder.read_lines("x.jsonl") == lines[:3]


def test_what_is_appended_is_found_by_others_and_after_the_file_was_written_anew(folder):
    other = RunFolder(folder.storage, "run")
    for number in range(12):  # more than one digit
        folder.append_text("x", f"{number}\n")
    assert other.read_lines("x") == [f"{number}\n" for number in range(12)]
    other.append_text("x", "12\n")
    assert folder.read_lines("x")[-2:] == ["11\n", "12\n"]
    for kept in ([], ["0\n", "1\n"], []):  # also content that the file has had before
        folder.write_lines("x", kept)
        assert other.read_lines("x") == kept
        folder.append_text("x", "2\n")
        folder.append_text("x", "3\n")
        assert other.read_lines("x") == [*kept, "2\n", "3\n"]
    folder.write_lines("x", folder.read_lines("x"))
    assert folder.read_text("x") == "2\n3\n"
    assert folder.names("x.parts") == []


def test_an_append_to_an_object_store_sends_what_is_appended_and_no_more():
    """The file was read and written whole for every record: of 10,000, 35 GB each way."""
    folder, line = RunFolder(f"memory://{uuid4()}", "run"), "x" * 99 + "\n"
    for _ in range(50):
        folder.append_text("x", line)
    names = folder.names("x.parts")
    assert [len(folder.read_bytes(f"x.parts/{name}")) for name in names] == [100] * 50
    assert folder.read_bytes("x") == b""


def test_an_upload_replaces_the_folder(folder, tmp_path):
    local = tmp_path / "local"
    (local / "deep").mkdir(parents=True)
    (local / "deep" / "x.bin").write_bytes(b"x")
    folder.write_text("export/old.txt", "old")
    folder.upload(local, "export")
    assert folder.read_text("export/deep/x.bin") == "x"
    assert not folder.exists("export/old.txt")


def test_a_relative_storage_means_the_same_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/", "r")
    monkeypatch.chdir("/")
    folder.write_text("x", "y")
    assert (tmp_path / "runs" / "r" / "x").read_text() == "y"
    assert folder.path("x") == str(tmp_path / "runs" / "r" / "x")


@pytest.mark.slow
def test_ranks_that_write_the_same_file_at_once_all_succeed(tmp_path):
    """Both ranks of a new run write its tokenizer: the second rename used to find that the first had taken its file."""
    folder = RunFolder(str(tmp_path), "run")
    with ThreadPoolExecutor(8) as threads:
        for round_ in range(50):
            writes = [threads.submit(folder.write_text, "tokenizer.json", f"{round_}") for _ in range(8)]
            assert [write.result() for write in writes] == [None] * 8
            assert folder.read_text("tokenizer.json") == f"{round_}"
    assert folder.names("") == ["tokenizer.json"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    (tmp_path / "run" / "config.json" / "taken").mkdir(parents=True)  # a folder where the file should go
    with pytest.raises(OSError, match="config"):
        folder.write_text("config.json", "x")
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_added_after_a_file_was_written_anew_is_read(folder):
    folder.append_text("lines", "a\n")
    folder.write_text("lines", "b\n")
    folder.append_text("lines", "c\n")
    assert folder.read_lines("lines") == ["b\n", "c\n"]
