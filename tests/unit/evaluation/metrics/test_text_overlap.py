"""Error rates, exact match and token F1 against plain recursion and counting."""

from functools import cache

import pytest

from mowe_ray.evaluation.metrics.text_overlap import CER, EXACT_MATCH, TOKEN_F1, WER
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.text_normalization import normalise_transcript
from tests.made_answers import answers_of
from tests.unit.evaluation.test_text_normalization import squad


@cache
def edits(one: tuple, other: tuple) -> int:
    """Fewest insertions, deletions and substitutions, by plain recursion."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return edits(one[1:], other[1:])
    return 1 + min(edits(one[1:], other), edits(one, other[1:]), edits(one[1:], other[1:]))


@pytest.mark.parametrize(("metric", "units"), [(WER, str.split), (CER, list)])
def test_errors_of_the_whole_set_by_all_units_of_the_best_references(metric, units):
    answers = answers_of("asr", most_words=6)
    wrong = total = 0
    for answer in answers:
        given = tuple(units(normalise_transcript(answer.answer)))
        references = [tuple(units(normalise_transcript(r))) for r in answer.references]
        _, errors, length = min((edits(given, r) / len(r), edits(given, r), len(r)) for r in references)
        wrong, total = wrong + errors, total + length
    assert metric.of(answers) == pytest.approx(100 * wrong / total, abs=1e-9)
    assert 20 < metric.of(answers) < 80, "a set that says something"


def test_worked_example_of_error_rates():
    answer = Answer("1", "asr", "", "the cat sat on mat", ["The cat sat on the mat."])
    assert WER.of([answer]) == pytest.approx(100 / 6)
    assert CER.of([answer]) == pytest.approx(100 * 4 / 22)
    other = Answer("2", "asr", "", "", ["hello"])
    assert WER.statistics([answer, other]).tolist() == [[1, 6], [1, 1]]
    assert WER.of([answer, other]) == pytest.approx(100 * 2 / 7), "not the mean of the two rates"


def test_silence_is_a_word_and_insertions_may_exceed_the_reference():
    assert WER.of([Answer("1", "asr", "", "um", ["(coughs)"])]) == 0.0
    assert WER.of([Answer("1", "asr", "", "one dog two", ["dog"])]) == 200.0
    assert WER.statistics([]).shape == (0, 2)


def f1(given: list[str], wanted: list[str]) -> float:
    """Harmonic mean of precision and recall, crossing off words one by one."""
    if not given or not wanted:
        return float(given == wanted)
    left, shared = list(wanted), 0
    for word in given:
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = shared / len(given), shared / len(wanted)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def test_both_metrics_take_the_best_reference():
    answers = answers_of("aqa", most_words=4)
    same = overlap = 0.0
    for answer in answers:
        same += max(squad(answer.answer) == squad(r) for r in answer.references)
        overlap += max(f1(squad(answer.answer).split(), squad(r).split()) for r in answer.references)
    assert EXACT_MATCH.of(answers) == pytest.approx(100 * same / len(answers), abs=1e-9)
    assert TOKEN_F1.of(answers) == pytest.approx(100 * overlap / len(answers), abs=1e-9)
    assert 10 < EXACT_MATCH.of(answers) < TOKEN_F1.of(answers) < 90


def test_worked_examples_of_question_answering():
    answer = Answer("1", "sqa", "", "the Denver Broncos", ["Denver Broncos!", "Broncos"])
    assert EXACT_MATCH.of([answer]) == TOKEN_F1.of([answer]) == 100
    answer = Answer("2", "sqa", "", "in the city of Denver", ["Denver, Colorado"])
    assert EXACT_MATCH.of([answer]) == 0
    assert TOKEN_F1.of([answer]) == pytest.approx(100 * 2 * 1 / (4 + 2))
    assert TOKEN_F1.of([Answer("3", "sqa", "", "the", [""])]) == 0, "an article is not nothing"
    assert TOKEN_F1.of([Answer("3", "sqa", "", " ", [""])]) == 100, "nothing equals nothing"
    assert TOKEN_F1.of([Answer("4", "sqa", "", "the", ["cat"])]) == 0
