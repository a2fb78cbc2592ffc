"""Corpora of questions about sounds and speech: Clotho-AQA, SLUE-SQA5, Spoken-SQuAD, and benchmarks of choices.

Clotho-AQA: six questions about each clip, each answered in a word by three annotators.

    clotho_aqa_train.csv  clotho_aqa_val.csv  clotho_aqa_test.csv     file_name,QuestionText,answer,confidence
    audio_files/*.wav                                                 of all splits together

as on zenodo.org/records/6473207 with audio_files.zip unpacked. A row is one annotator's answer, with a confidence of
yes, no or maybe.

SLUE-SQA5 (SLUE phase 2): questions about a spoken document of about 40 s, answered in its words.

    sqa5/train-00000-of-00270.parquet ...  validation-*  test-*  verified_test-*

is how huggingface.co/datasets/asapp/slue-phase-2 has it since January 2024. Columns: question_id, question_audio,
raw_question_text, normalized_question_text, document_id, document_audio, ..., and answer_spans, a structure of lists
answer, start_second, end_second (read here as a list of structures too). The older slue-sqa5.zip with TSVs is not read.
`verified_test` are the 408 questions that AudioBench asks.

Spoken-SQuAD: SQuAD's questions about paragraphs that were read by a machine, sentence by sentence.

    spoken_train-v1.1.json  train_wav/TOPIC_PARAGRAPH_SENTENCE.wav
    spoken_test-v1.1.json   dev_wav/TOPIC_PARAGRAPH_SENTENCE.wav

The JSON files are in github.com/Chia-Hsuan-Lee/Spoken-SQuAD, in SQuAD's form; the clips (24 kHz) in
Spoken-SQuAD_audio.zip, which holds train_wav.zip and dev_wav.zip. The numbers in the names are positions, from 0, in
the JSON, which keeps paragraphs without questions, so that they count. Contexts and answers are what a speech
recogniser made of the clips. Of the noisier test sets (WER44, WER54) only such transcripts are published; they are not
read.

MMAU, MMAU-Pro, MMAR and MMSU: questions with choices, one JSON list, JSON lines or Parquet file each, which names the
clips relative to its folder (github.com/Sakshi113/MMAU, huggingface.co/datasets/gamma-lab-umd/MMAU-Pro,
github.com/ddlBoJack/MMAR, huggingface.co/datasets/ddwang2000/MMSU).

    mmau-test-mini.json    audio_id,   question, choices, answer, task (sound, music, speech), category, difficulty, ...
    test.parquet           audio_path, question, choices, answer, category, ...    of MMAU-Pro; several clips a question
    MMAR-meta.jsonl        audio_path, question, choices, answer, modality, category, sub-category, ...
    mmsu.jsonl             audio_path, question, choice_a to choice_d, answer_gt, category, ...
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.corpora.layout import Defaults, each_row, find, need, read_csv, read_json
from mowe_ray.data.corpora.manifest_and_folders import SUFFIXES, manifest_rows
from mowe_ray.data.corpora.parquet import Fields, read_parquet
from mowe_ray.data.decode import decode_audio
from mowe_ray.data.sample import BadAudio, BadSample, Sample
from mowe_ray.data.shards.choices import BY_LETTER, BY_TEXT
from mowe_ray.data.shards.manifest import first_entry
from mowe_ray.data.synthetic_corpus.sounds import encode_flac

CLOTHO_AQA_SPLITS = ("train", "val", "test")


def is_clotho_aqa(path: Path) -> bool:
    """Whether a folder holds one of the tables."""
    return any(find(path, f"clotho_aqa_{split}.csv") for split in CLOTHO_AQA_SPLITS)


def read_clotho_aqa(folder: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split; the question is the instruction.

    The answers to a question are those of `best_answers`. In val and test a question is one sample with these as
    references; in train each is a sample. Annotators who contradict each other, one sure of yes and one of no, leave a
    question without an answer, and it is counted so.

    Args:
        folder: with the CSV of the split and `audio_files` in it.
        defaults: task.
        split: one of CLOTHO_AQA_SPLITS.

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


SLUE_SQA5_SPLITS = ("train", "validation", "test", "verified_test")
_SLUE_COLUMNS = {"question_id", "raw_question_text", "document_audio", "answer_spans"}


def is_slue_sqa5(file: Path) -> bool:
    """Whether a Parquet file has the columns of SLUE-SQA5."""
    return set(pq.read_schema(file).names) >= _SLUE_COLUMNS


def read_slue_sqa5(path: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split: the document is the audio, and the question's text the instruction.

    The spoken question is left out. Every distinct answer is a reference, on all splits: they are spellings of one
    answer, and rows that differ in nothing else would only repeat the question.

    Args:
        path: a Parquet file, or a folder with those of the split in it.
        defaults: task.
        split: one of SLUE_SQA5_SPLITS.

    Raises:
        ValueError: there is no file of the split, or it has other columns.
    """

    def fields_of(row: Fields) -> Fields:
        if missing := _SLUE_COLUMNS - row.keys():
            raise ValueError(f"{path}: not SLUE-SQA5, it has no {', '.join(sorted(missing))}")
        return {
            "id": row["question_id"],
            "audio": row["document_audio"],
            "question": row["raw_question_text"] or row.get("normalized_question_text"),
            "references": _span_answers(row["answer_spans"]),
        }

    return read_parquet(path, defaults, split, fields_of)


def _span_answers(spans: Any) -> list[str]:
    if isinstance(spans, Mapping):
        return list(spans.get("answer") or [])
    return [span["answer"] for span in spans or []]


_SQUAD_CLIPS = {"train": "train_wav", "test": "dev_wav"}
SPOKEN_SQUAD_SPLITS = tuple(_SQUAD_CLIPS)
_LONGEST_S = 3600.0
_SENTENCE_NAME = re.compile(r"(\d+)_(\d+)_(\d+)\.wav")


def is_spoken_squad(path: Path) -> bool:
    """Whether a folder holds one of the JSON files."""
    return any(find(path, f"spoken_{split}-v1.1.json") for split in SPOKEN_SQUAD_SPLITS)


def read_spoken_squad(folder: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split: the audio is the whole paragraph, and the question the instruction.

    Nothing says in which sentence the answer is, so the sentences of a paragraph are joined, without pauses, as 16 kHz
    FLAC. A paragraph with a sentence missing in the middle counts as missing; one missing at the end shows nowhere.
    Every distinct answer is a reference.

    Args:
        folder: with the JSON file and the folder of clips in it.
        defaults: task.
        split: one of SPOKEN_SQUAD_SPLITS.

    Raises:
        ValueError: the JSON file or the folder of the clips is not there.
    """
    table = need(folder, f"spoken_{split}-v1.1.json", "Spoken-SQuAD")
    sentences = _sentence_clips(need(folder, _SQUAD_CLIPS[split], "Spoken-SQuAD"))

    def make(numbered: tuple[int, Any]) -> Iterator[Sample | BadSample]:
        topic, article = numbered
        for number, paragraph in enumerate(article["paragraphs"]):
            clips = sentences.get((topic, number), {})
            yield from _paragraph_samples(paragraph["qas"], clips, f"{topic}_{number}", defaults, child)

    with ChildProcess() as child:
        yield from each_row(enumerate(read_json(table)["data"]), make, table, defaults.source)


def _paragraph_samples(
    questions: list[dict[str, Any]], sentences: dict[int, Path], name: str, defaults: Defaults, child: ChildProcess
) -> Iterator[Sample | BadSample]:
    if not questions:
        return
    try:
        if sorted(sentences) != list(range(len(sentences))) or not sentences:
            missing = next(n for n in range(len(sentences) + 1) if n not in sentences)
            raise BadAudio("no_audio", f"{name}_{missing}.wav is missing")
        audio = child.call(join_clips, [sentences[n] for n in sorted(sentences)])
    except (BadAudio, ChildDied) as error:
        bad = error if isinstance(error, BadAudio) else BadAudio("crashed", str(error))
        yield from (BadSample(asked["id"], defaults.source, bad.cause, bad.detail) for asked in questions)
        return
    for asked in questions:
        answers = [answer["text"] for answer in asked["answers"]]
        fields = {"id": asked["id"], "audio": audio, "question": asked["question"], "references": answers}
        yield defaults.sample(fields, asked["id"], Path())


def join_clips(files: Sequence[Path]) -> bytes:
    """Decode clips and return them one after the other as one 16 kHz FLAC; BadAudio names what is wrong with one."""
    return encode_flac(np.concatenate([decode_audio(file.read_bytes(), None, 0, _LONGEST_S) for file in files]))


def _sentence_clips(clips: Path) -> dict[tuple[int, int], dict[int, Path]]:
    """Clips by (topic, paragraph), then by sentence."""
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for file in clips.iterdir():
        if name := _SENTENCE_NAME.fullmatch(file.name):
            topic, paragraph, sentence = map(int, name.groups())
            found.setdefault((topic, paragraph), {})[sentence] = file
    return found


_MMSU_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_OPEN = ("open", "instruction following")  # categories of MMAU-Pro whose answers no choice is
# What accuracy is given apart by.
_GROUPS = (
    *("modality", "category", "sub-category", "sub-sub-category", "task_name", "difficulty"),
    *("length_type", "language"),
)


def is_multiple_choice(path: Path) -> bool:
    """Whether a file has the fields of MMAU, MMAU-Pro, MMAR or MMSU."""
    if not path.is_file() or path.suffix not in (".json", ".jsonl", ".parquet"):
        return False
    try:
        names = set(pq.read_schema(path).names if path.suffix == ".parquet" else first_entry(str(path)))
    except (BadAudio, OSError, ValueError):  # a broken file, which reading counts
        return False
    mmsu = {"audio_path", "question", "answer_gt", *_MMSU_CHOICES[:2]}
    return names >= mmsu or (names >= {"question", "choices", "answer"} and bool(names & {"audio_id", "audio_path"}))


def read_multiple_choice(path: Path, defaults: Defaults) -> Iterator[Sample | BadSample]:
    """Read a benchmark; MMSU's questions are answered with a letter, those of the others with the text of a choice.

    Rows of MMAU-Pro without choices (open questions, instructions to follow) are left out.

    Args:
        path: One file.
        defaults: `mcq` or `mcq_letter` as task changes how it is answered.
    """
    if path.suffix not in SUFFIXES:
        for item in read_parquet(path, defaults, None, lambda row: _choice_fields(row, defaults)):
            if isinstance(item, BadSample) or item.choices:
                yield item
        return
    for number, row in enumerate(manifest_rows(path)):
        name = f"{path.stem}-{number:06d}"
        if isinstance(row, BadAudio):
            yield BadSample(name, defaults.source, row.cause, row.detail)
            continue
        fields = _choice_fields(row, defaults)
        if fields["choices"]:
            yield defaults.sample(fields, name, path)


def _choice_fields(row: Fields, defaults: Defaults) -> Fields:
    by_letter = _MMSU_CHOICES[0] in row
    choices = [row.get(name) for name in _MMSU_CHOICES] if by_letter else row.get("choices")
    closed = isinstance(choices, list) and len(choices) > 1 and row.get("category") not in _OPEN
    # MMAU calls the modality its task.
    groups = {"modality": row.get("task")} | {name: row[name] for name in _GROUPS if row.get(name)}
    return {
        "id": row.get("id"),
        "audio": row.get("audio_id") or row.get("audio_path"),
        "question": row.get("question"),
        "choices": [choice for choice in choices or () if choice] if closed else [],
        "answer": row.get("answer_gt", row.get("answer")),
        "task": defaults.task or (BY_LETTER if by_letter else BY_TEXT),
        "groups": groups,
    }
