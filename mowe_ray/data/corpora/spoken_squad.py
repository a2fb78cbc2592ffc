"""Spoken-SQuAD: SQuAD's questions about paragraphs that were read by a machine, sentence by sentence.

    spoken_train-v1.1.json  train_wav/TOPIC_PARAGRAPH_SENTENCE.wav
    spoken_test-v1.1.json   dev_wav/TOPIC_PARAGRAPH_SENTENCE.wav

The JSON files are in github.com/Chia-Hsuan-Lee/Spoken-SQuAD, in SQuAD's form; the clips (24 kHz) in
Spoken-SQuAD_audio.zip, which holds train_wav.zip and dev_wav.zip. The numbers in the names are positions, from 0, in
the JSON, which keeps paragraphs without questions, so that they count. Contexts and answers are what a speech
recogniser made of the clips. Of the noisier test sets (WER44, WER54) only such transcripts are published; they are not
read.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mowe_ray.data.corpora.layout import Defaults, find, need
from mowe_ray.data.decode import decode_audio
from mowe_ray.data.sample import BadAudio, BadSample, Sample
from mowe_ray.data.synthetic_corpus.recording import encode_flac

_CLIPS = {"train": "train_wav", "test": "dev_wav"}
SPLITS = tuple(_CLIPS)
_LONGEST_S = 3600.0
_NAME = re.compile(r"(\d+)_(\d+)_(\d+)\.wav")


def is_spoken_squad(path: Path) -> bool:
    """Whether a folder holds one of the JSON files."""
    return any(find(path, f"spoken_{split}-v1.1.json") for split in SPLITS)


def read_spoken_squad(folder: Path, defaults: Defaults, split: str) -> Iterator[Sample | BadSample]:
    """Read one split: the audio is the whole paragraph, and the question the instruction.

    Nothing says in which sentence the answer is, so the sentences of a paragraph are joined, without pauses, as 16 kHz
    FLAC. A paragraph with a sentence missing in the middle counts as missing; one missing at the end shows nowhere.
    Every distinct answer is a reference.

    Args:
        folder: with the JSON file and the folder of clips in it.
        defaults: task.
        split: one of SPLITS.

    Raises:
        ValueError: the JSON file or the folder of the clips is not there.
    """
    table = need(folder, f"spoken_{split}-v1.1.json", "Spoken-SQuAD")
    sentences = _sentences(need(folder, _CLIPS[split], "Spoken-SQuAD"))
    for topic, article in enumerate(json.loads(table.read_text(encoding="utf-8"))["data"]):
        for number, paragraph in enumerate(article["paragraphs"]):
            yield from _paragraph(paragraph["qas"], sentences.get((topic, number), {}), f"{topic}_{number}", defaults)


def _paragraph(
    questions: list[dict[str, Any]], sentences: dict[int, Path], name: str, defaults: Defaults
) -> Iterator[Sample | BadSample]:
    if not questions:
        return
    try:
        if sorted(sentences) != list(range(len(sentences))) or not sentences:
            missing = next(n for n in range(len(sentences) + 1) if n not in sentences)
            raise BadAudio("no_audio", f"{name}_{missing}.wav is missing")
        audio = join_clips([sentences[n] for n in sorted(sentences)])
    except BadAudio as error:
        yield from (BadSample(asked["id"], defaults.source, error.cause, error.detail) for asked in questions)
        return
    for asked in questions:
        answers = [answer["text"] for answer in asked["answers"]]
        fields = {"id": asked["id"], "audio": audio, "question": asked["question"], "references": answers}
        yield defaults.sample(fields, asked["id"], Path())


def join_clips(files: Sequence[Path]) -> bytes:
    """Decode clips and return them one after the other as one 16 kHz FLAC; BadAudio names what is wrong with one."""
    return encode_flac(np.concatenate([decode_audio(file.read_bytes(), None, 0, _LONGEST_S) for file in files]))


def _sentences(clips: Path) -> dict[tuple[int, int], dict[int, Path]]:
    """Clips by (topic, paragraph), then by sentence."""
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for file in clips.iterdir():
        if name := _NAME.fullmatch(file.name):
            topic, paragraph, sentence = map(int, name.groups())
            found.setdefault((topic, paragraph), {})[sentence] = file
    return found
