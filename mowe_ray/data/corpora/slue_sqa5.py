"""SLUE-SQA5 (SLUE phase 2): questions about a spoken document of about 40 s, answered in its words.

    sqa5/train-00000-of-00270.parquet ...  validation-*  test-*  verified_test-*

is how huggingface.co/datasets/asapp/slue-phase-2 has it since January 2024. Columns: question_id, question_audio,
raw_question_text, normalized_question_text, document_id, document_audio, ..., and answer_spans, a structure of lists
answer, start_second, end_second (read here as a list of structures too). The older slue-sqa5.zip with TSVs is not read.
`verified_test` are the 408 questions that AudioBench asks.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mowe_ray.data.corpora.hf_parquet import Row, read_parquet
from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.sample import BadSample, Sample

SPLITS = ("train", "validation", "test", "verified_test")
_COLUMNS = {"question_id", "raw_question_text", "document_audio", "answer_spans"}


def is_slue_sqa5(file: Path) -> bool:
    """Whether a Parquet file has the columns of SLUE-SQA5."""
    return set(pq.read_schema(file).names) >= _COLUMNS


def read_slue_sqa5(path: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split: the document is the audio, and the question's text the instruction.

    The spoken question is left out. Every distinct answer is a reference, on all splits: they are spellings of one
    answer, and rows that differ in nothing else would only repeat the question.

    Args:
        path: a Parquet file, or a folder with those of the split in it.
        defaults: task.
        split: one of SPLITS.

    Raises:
        ValueError: there is no file of the split, or it has other columns.
    """

    def fields_of(row: Row) -> Row:
        if missing := _COLUMNS - row.keys():
            raise ValueError(f"{path}: not SLUE-SQA5, it has no {', '.join(sorted(missing))}")
        return {
            "id": row["question_id"],
            "audio": row["document_audio"],
            "question": row["raw_question_text"] or row.get("normalized_question_text"),
            "references": _answers(row["answer_spans"]),
        }

    return read_parquet(path, defaults, split, fields_of)


def _answers(spans: Any) -> list[str]:
    if isinstance(spans, Mapping):
        return list(spans.get("answer") or [])
    return [span["answer"] for span in spans or []]
