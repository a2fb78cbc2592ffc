"""Numbers of classes, NaN and null were trained as answers: "1", "-1", "nan".

Reports: huggingface/datasets#346 and #4467, harvard-edge/multilingual_kws#9.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.parquet import read_parquet
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.shards.record import parse_record
from tests.read_source import CLIP, QUESTION, read_source

CLASS_LABEL = {"names": ["sad", "happy"], "_type": "ClassLabel"}


def write_labelled(path: Path, answers: list[Any], feature: Any, **columns: Any) -> None:
    columns = {"audio": [{"bytes": CLIP, "path": None}] * len(answers), "answer": answers, **columns}
    table = pa.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": {"answer": feature}}})}
    )
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_classes_are_answers_by_name_and_no_class_is_no_answer(tmp_path: Path, suffix: str) -> None:
    # The transcript must not step in for a label that is not there.
    write_labelled(tmp_path / f"a.{suffix}", [1, 0, -1, None, 7], CLASS_LABEL, text=["hello"] * 5)
    found = read_source(tmp_path / f"a.{suffix}", tmp_path, "er")
    assert found.answers == ["happy", "sad"]
    assert found.causes == ["no_answer"] * 3


@pytest.mark.parametrize("feature", [[CLASS_LABEL], {"feature": CLASS_LABEL, "_type": "Sequence"}], ids=["old", "new"])
def test_lists_of_classes_are_references(tmp_path: Path, feature: Any) -> None:
    write_labelled(tmp_path / "a.parquet", [[1, 0], [-1, 0], [-1], []], feature)
    found = read_source(tmp_path / "a.parquet", tmp_path, "er")
    assert found.answers == ["happy", "sad"]
    assert found.causes == ["no_answer"] * 2


def test_prepare_names_classes_and_counts_rows_without_one(tmp_path: Path) -> None:
    write_labelled(tmp_path / "a.parquet", [1, -1, None, 9], CLASS_LABEL)
    found = list(read_parquet(tmp_path / "a.parquet", Defaults("corpus", task="er")))
    assert [sample.answer for sample in found if isinstance(sample, Sample)] == ["happy"]
    assert [sample.cause for sample in found if isinstance(sample, BadSample)] == ["no_answer"] * 3


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "null", '""', '"  "', "[]", "[null]"])
def test_a_json_value_that_is_no_answer(tmp_path: Path, literal: str) -> None:
    fields = QUESTION | {"audio": "a.wav", "text": "a transcript"}
    text = json.dumps(fields).replace('"a tone"', literal)
    (tmp_path / "a.wav").write_bytes(CLIP)
    (tmp_path / "m.jsonl").write_text(text + "\n")
    found = read_source(tmp_path / "m.jsonl", tmp_path)
    assert found.causes == ["no_answer"]
    assert not found.good


def test_gaps_in_a_column_of_numbers(tmp_path: Path) -> None:
    columns = {"question": ["How many?"] * 4, "answer": [3.0, float("nan"), 2.5, None], "task": ["aqa"] * 4}
    pq.write_table(pa.table(columns | {"audio": [CLIP] * 4}), tmp_path / "a.parquet")
    found = read_source(tmp_path / "a.parquet", tmp_path)
    assert found.answers == ["3", "2.5"]
    assert found.causes == ["no_answer"] * 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (3.0, "3"), (0.25, "0.25"), (0, "0"), (True, ""), ({"text": "x"}, ""), ("nan", "nan"), ("None", "None")],
)
def test_numbers_are_written_out_and_strings_are_never_changed(value: Any, text: str) -> None:
    assert parse_record({"audio": "a.wav", "answer": value}).answer == text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"instruction": {"text": "What is heard?"}}, "'instruction' is"),
        ({"question": [["What?", "Which?"]]}, "'question' is"),
        ({"task": {"name": "aqa"}}, "'task' is"),
        ({"query": "What?", "system": {"text": "Be short."}}, "'system' is"),
        ({"query": "What?", "history": [["How long?", "a second"], ["How loud?"]]}, "history is a list of"),
        ({"query": "What?", "history": [{"role": "user", "content": "How long?"}]}, "history is a list of"),
    ],
    ids=str,
)
def test_texts_in_another_form_are_not_replaced_by_the_usual_ones(tmp_path: Path, fields: dict, named: str) -> None:
    """A row that asked for an emotion in a mapping was trained as a transcription; half a history was dropped."""
    rows = [{"audio": "a.wav", "text": "hello", "task": "asr"}, {"audio": "a.wav", "text": "hello"} | fields]
    (tmp_path / "a.wav").write_bytes(CLIP)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_source(tmp_path / "m.jsonl", tmp_path, "asr")
    assert found.causes == ["unreadable"]
    assert named in found.bad[0].detail
    assert found.answers == ["hello"]


@pytest.mark.parametrize("gap", [None, float("nan"), "", [], {}, [None], {"text": None}], ids=str)
def test_a_gap_is_no_text_in_another_form(gap: Any) -> None:
    record = parse_record({"audio": "a.wav", "text": "hello", "instruction": gap, "task": gap, "history": []})
    assert (record.instruction, record.task, record.answer) == ("", None, "hello")
