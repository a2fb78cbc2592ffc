"""JSON lists with a byte order mark, after an empty line or cut off, and UTF-16, were unreadable or lost their cause.

Byte order marks: https://github.com/huggingface/datasets/issues/8241 and many others.
"""

import codecs
import json

import pytest

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.prepare import main
from tests.audio_files import by_sndfile

ROWS = [{"audio": "a.wav", "text": f"größe {n} \U0001f600"} for n in range(3)]
LISTS = {
    "plain": json.dumps(ROWS, ensure_ascii=False).encode(),
    "mark": codecs.BOM_UTF8 + json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "empty lines": b"\r\n \n\t" + json.dumps(ROWS, indent=2).encode() + b"\n\n",
    "mark and empty line": codecs.BOM_UTF8 + b"\n" + json.dumps(ROWS).encode(),
    "end of lines": json.dumps(ROWS, ensure_ascii=False, indent=1).replace("\n", "\r\n").encode(),
}
LINES = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ROWS)
TABLE = "audio\ttext\n" + "".join(f"{row['audio']}\t{row['text']}\n" for row in ROWS)


@pytest.fixture
def read(tmp_path):
    """Return the answers and the bad samples (id, cause, detail) that training and prepare find, which are the same."""
    (tmp_path / "a.wav").write_bytes(by_sndfile("WAV", "PCM_16", seconds=1.0))

    def answers_and_bad(name: str, content: bytes) -> tuple[list[str], list[tuple[str, str, str]]]:
        (tmp_path / name).write_bytes(content)
        index = build_index([SourceSpec("s", str(tmp_path / name), "asr")], tmp_path, min_s=0.1, max_s=30.0)
        batch = load_micro_batch(index.table, 0.1, 30.0)
        out = tmp_path / f"out-{name}"
        assert main([str(tmp_path / name), "--out", str(out), "--task", "asr"]) == (0 if batch.ids else 1)
        report = json.loads((out / "data_report.json").read_text())
        bad = [*index.bad, *batch.bad]
        assert (report["good"], [b["cause"] for b in report["bad_samples"]]) == (len(batch.ids), [b.cause for b in bad])
        return batch.answers, [(b.id, b.cause, b.detail) for b in bad]

    return answers_and_bad


@pytest.mark.slow
@pytest.mark.parametrize("content", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_a_list_in_any_of_its_forms(read, name, content):
    assert read(name, content) == ([row["text"] for row in ROWS], [])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [("m.jsonl", LINES), ("m.tsv", TABLE)])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_and_tables_with_a_mark(read, name, text, ending):
    content = codecs.BOM_UTF8 + text.replace("\n", ending).encode()
    assert read(name, content) == ([row["text"] for row in ROWS], [])


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 5, 20, 47, 48, 90])
def test_a_list_that_is_cut_off_keeps_what_came_before(read, cut):
    answers, bad = read("m.json", json.dumps(ROWS)[:-cut].encode())
    assert answers == [row["text"] for row in ROWS][: len(answers)]
    assert len(answers) >= (3 if cut == 1 else 3 - (cut + 46) // 47 - 1)
    [(name, cause, detail)] = bad
    assert (name, cause) == ("m.json", "broken_shard")
    assert "ends early" in detail


@pytest.mark.slow
@pytest.mark.parametrize(
    "middle",
    [
        '{"audio": tru}',
        '{"audio": "a.wav" "text": "]"}',
        '{"a": ' + "[" * 9000 + "]" * 9000 + "}",
        "5",
        '"x"',
        "}",
        "nul",
    ],
)
def test_a_wrong_entry_of_a_list_is_one_bad_sample(read, middle):
    first, last = json.dumps(ROWS[0]), json.dumps(ROWS[2])
    answers, bad = read("m.json", f"[{first}, {middle}, {last}]".encode())
    assert answers == [ROWS[0]["text"], ROWS[2]["text"]]
    assert [(name, cause) for name, cause, _ in bad] == [("m.json:1", "unreadable")]


@pytest.mark.slow
def test_a_wrong_byte_in_a_list_costs_its_entry(read):
    content = json.dumps(ROWS, ensure_ascii=False).encode().replace("größe 1".encode(), b"gr\xf6\xdfe 1")
    answers, bad = read("m.json", content)
    assert answers == [ROWS[0]["text"], ROWS[2]["text"]]
    assert [cause for _, cause, _ in bad] == ["unreadable"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(("name", "text"), [("m.jsonl", LINES), ("m.json", json.dumps(ROWS)), ("m.tsv", TABLE)])
def test_utf16_is_refused_by_name(tmp_path, capsys, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"{name} is in UTF-16: convert it, as by .iconv"):
        build_index([SourceSpec("s", str(tmp_path / name), "asr")], tmp_path, min_s=0.1, max_s=30.0)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / name), "--out", str(tmp_path / "out"), "--task", "asr"])
    assert stopped.value.code == 2
    assert "UTF-16" in capsys.readouterr().err
