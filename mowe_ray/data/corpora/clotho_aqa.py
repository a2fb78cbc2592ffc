"""Clotho-AQA: six questions about each clip, each answered in a word by three annotators.

    clotho_aqa_train.csv  clotho_aqa_val.csv  clotho_aqa_test.csv     file_name,QuestionText,answer,confidence
    audio_files/*.wav                                                 of all splits together

as on zenodo.org/records/6473207 with audio_files.zip unpacked. A row is one annotator's answer, with a confidence of
yes, no or maybe.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mowe_ray.data.corpora.layout import Defaults, find, need, read_csv
from mowe_ray.data.sample import BadSample, Sample

SPLITS = ("train", "val", "test")


def is_clotho_aqa(path: Path) -> bool:
    """Whether a folder holds one of the tables."""
    return any(find(path, f"clotho_aqa_{split}.csv") for split in SPLITS)


def read_clotho_aqa(folder: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split; the question is the instruction.

    The answers to a question are those of `best_answers`. In val and test a question is one sample with these as
    references; in train each is a sample. Annotators who contradict each other, one sure of yes and one of no, leave a
    question without an answer, and it is counted so.

    Args:
        folder: with the CSV of the split and `audio_files` in it.
        defaults: task.
        split: one of SPLITS.

    Raises:
        ValueError: the CSV or the folder of the clips is not there.
    """
    table = need(folder, f"clotho_aqa_{split}.csv", "Clotho-AQA")
    clips = need(folder, "audio_files", "Clotho-AQA")
    votes: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in read_csv(table, "file_name", "QuestionText", "answer", "confidence"):
        vote = (row["answer"].strip().lower(), row["confidence"].strip().lower())
        votes.setdefault((row["file_name"], row["QuestionText"].strip()), []).append(vote)
    for (name, question), given in votes.items():
        best = best_answers(given)
        id = Path(name).stem
        if {"yes", "no"} <= set(best):
            yield BadSample(id, defaults.source, "no_answer", f"annotators contradict each other: {question}")
            continue
        fields = {"id": id, "audio": str((clips / name).absolute()), "question": question}
        for answer in best if split == "train" else [best]:
            yield defaults.sample({**fields, "answer": answer}, id, table)


def best_answers(votes: Sequence[tuple[str, str]]) -> list[str]:
    """Return the answers that most annotators gave, of those who were sure if anybody was.

    Args:
        votes: (answer, confidence) of each annotator, both in lower case.
    """
    given = [(answer, confidence) for answer, confidence in votes if answer]
    counts = Counter([answer for answer, confidence in given if confidence == "yes"] or [answer for answer, _ in given])
    return [answer for answer, count in counts.items() if count == max(counts.values())]
