"""Overlap of an answer with its references: error rates of words and characters, exact match, token F1 and chrF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import jiwer
import numpy as np

from mowe_ray.evaluation.metrics.metric import Array, Metric, mean_metric, mean_percent
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.text_normalization import (
    has_accents,
    has_unspaced,
    normalise_answer,
    normalise_any_transcript,
    normalise_transcript,
    part_unspaced,
    seems_english,
)

Edits = tuple[int, int]  # insertions, deletions and substitutions; units of the reference


def _word_edits(reference: str, answer: str) -> Edits:
    return _edits(jiwer.process_words(reference, answer))


def _character_edits(reference: str, answer: str) -> Edits:
    return _edits(jiwer.process_characters(reference, answer))


def _edits(alignment: jiwer.WordOutput | jiwer.CharacterOutput) -> Edits:
    wrong = alignment.substitutions + alignment.deletions
    return wrong + alignment.insertions, wrong + alignment.hits


def _parted_word_edits(reference: str, answer: str) -> Edits:
    return _word_edits(part_unspaced(reference), part_unspaced(answer))


def _fewest_edits(answer: Answer, normalise: Callable[[str], str], count: Callable[[str, str], Edits]) -> Edits:
    """Count against the reference with the lowest error rate; of several, the one with the fewest errors."""
    given = normalise(answer.answer)
    edits_by_reference = [count(normalise(reference), given) for reference in answer.references]
    # Normalised, no reference is empty.
    return min(edits_by_reference, key=lambda edits: (edits[0] / edits[1], edits[0]))


def _error_rate(name: str, title: str, english: bool, count: Callable[[str, str], Edits]) -> Metric:
    normalise = normalise_transcript if english else normalise_any_transcript

    def statistics(answers: Sequence[Answer]) -> Array:
        rows = [_fewest_edits(answer, normalise, count) for answer in answers]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    note = _english_note if english else _other_note
    return Metric(name, title, "lower", statistics, mean_percent, note, "english" if english else "any language")


def _english_note(answers: Sequence[Answer]) -> str | None:
    if not any(has_accents(text) for answer in answers for text in (answer.answer, *answer.references)):
        return None
    return "accents do not count, as in AudioBench: if this is not English, set data.validation.N.language"


def _other_note(answers: Sequence[Answer]) -> str:
    note = "not by AudioBench's rules, which are for English: accents and vowel signs count"
    unspaced = any(has_unspaced(reference) for answer in answers for reference in answer.references)
    return f"{note}, characters of scripts without spaces count as words" if unspaced else note


WER = _error_rate("wer", "WER (%)", True, _word_edits)
CER = _error_rate("cer", "CER (%)", True, _character_edits)
_OTHER_WER = _error_rate("wer", "WER (%)", False, _parted_word_edits)
_OTHER_CER = _error_rate("cer", "CER (%)", False, _character_edits)


def wer(answers: Sequence[Answer], language: str | None = None) -> Metric:
    """Return the word error rate for the language of a set of answers.

    Args:
        answers: The whole set; without a language, its references tell whether they are English.
        language: A code such as `en` or `hi`, or None.
    """
    return WER if _is_english(answers, language) else _OTHER_WER


def cer(answers: Sequence[Answer], language: str | None = None) -> Metric:
    """Return the character error rate, as `wer`."""
    return CER if _is_english(answers, language) else _OTHER_CER


def _is_english(answers: Sequence[Answer], language: str | None) -> bool:
    if language is not None:
        return language.lower().replace("_", "-").split("-")[0] in ("en", "eng", "english")
    return seems_english(reference for answer in answers for reference in answer.references)


def _is_exact_match(answer: Answer) -> float:
    given = normalise_answer(answer.answer)
    return float(any(given == normalise_answer(reference) for reference in answer.references))


def _best_f1(answer: Answer) -> float:
    given = normalise_answer(answer.answer).split()
    return max(_f1(given, normalise_answer(reference).split()) for reference in answer.references)


def _f1(given: list[str], reference: list[str]) -> float:
    """Return the F1 of two bags of words; two empty ones are the same."""
    if not given or not reference:
        return float(given == reference)
    return 2 * (Counter(given) & Counter(reference)).total() / (len(given) + len(reference))


EXACT_MATCH = mean_metric("exact_match", "exact match (%)", _is_exact_match)
TOKEN_F1 = mean_metric("token_f1", "token F1 (%)", _best_f1)


# chrF (Popović 2015, https://aclanthology.org/W15-3049): F2 of character n-grams over a set, counted as sacrebleu does
# by default (nc:6, nw:0, space:no, case:mixed, eff:yes), so that its figures can be compared.
_ORDERS = 6
_BETA = 2.0


def _ngrams(text: str) -> list[Counter[str]]:
    text = "".join(text.split())
    return [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, _ORDERS + 1)]


def _ngram_counts(given: list[Counter[str]], reference: list[Counter[str]]) -> list[int]:
    """Return, of each order, the n-grams in common, given, and of the reference; no order that it is too short for."""
    return [
        number
        for g, r in zip(given, reference, strict=True)
        for number in ((g & r).total(), g.total() if r else 0, r.total())
    ]


def _chrf_statistics(answers: Sequence[Answer]) -> Array:
    rows = np.zeros((len(answers), 3 * _ORDERS))
    for row, answer in zip(rows, answers, strict=True):
        given = _ngrams(answer.answer)
        choices = np.array(
            [_ngram_counts(given, _ngrams(reference)) for reference in answer.references], dtype=np.float64
        )
        row[:] = choices[np.argmax(_chrf(choices))]
    return rows


def _chrf(sums: Array) -> Array:
    """Return F2 of the mean precision and the mean recall over the orders that both sides have, in percent."""
    common, given, reference = np.moveaxis(sums.reshape(*sums.shape[:-1], _ORDERS, 3), -1, 0)
    orders = (given > 0) & (reference > 0)
    number = np.maximum(1, orders.sum(-1))
    precision = np.divide(common, given, out=np.zeros_like(common), where=orders).sum(-1) / number
    recall = np.divide(common, reference, out=np.zeros_like(common), where=orders).sum(-1) / number
    below = _BETA**2 * precision + recall
    above = (1 + _BETA**2) * precision * recall
    return np.asarray(100 * np.divide(above, below, out=np.zeros_like(below), where=below > 0))


CHRF = Metric("chrf", "chrF (%)", "higher", _chrf_statistics, _chrf)
