"""Error rates of transcripts over a whole set: edits by units of the references, as jiwer counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jiwer
import numpy as np

from mowe_ray.evaluation.answers import Answer
from mowe_ray.evaluation.metrics.metric import Array, Metric, mean_percent
from mowe_ray.evaluation.text import normalise_transcript

Edits = tuple[int, int]  # insertions, deletions and substitutions; units of the reference


def _word_edits(reference: str, answer: str) -> Edits:
    return _edits(jiwer.process_words(reference, answer))


def _character_edits(reference: str, answer: str) -> Edits:
    return _edits(jiwer.process_characters(reference, answer))


def _edits(found: jiwer.WordOutput | jiwer.CharacterOutput) -> Edits:
    wrong = found.substitutions + found.deletions
    return wrong + found.insertions, wrong + found.hits


def _fewest_edits(answer: Answer, count: Callable[[str, str], Edits]) -> Edits:
    """Count against the reference with the lowest error rate; of several, the one with the fewest errors."""
    given = normalise_transcript(answer.answer)
    found = [count(normalise_transcript(reference), given) for reference in answer.references]
    return min(found, key=lambda edits: (edits[0] / edits[1], edits[0]))  # normalised, no reference is empty


def _error_rate(name: str, title: str, count: Callable[[str, str], Edits]) -> Metric:
    def statistics(answers: Sequence[Answer]) -> Array:
        return np.array([_fewest_edits(answer, count) for answer in answers], dtype=np.float64).reshape(-1, 2)

    return Metric(name, title, "lower", statistics, mean_percent)


WER = _error_rate("wer", "WER (%)", _word_edits)
CER = _error_rate("cer", "CER (%)", _character_edits)
