import pytest

from mowe_ray.evaluation.metrics.text_overlap import EXACT_MATCH, TOKEN_F1
from mowe_ray.evaluation.predictions import Answer
from tests.made_answers import answers_of
from tests.unit.evaluation.test_text_normalization import squad


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


def test_worked_examples():
    answer = Answer("1", "sqa", "", "the Denver Broncos", ["Denver Broncos!", "Broncos"])
    assert EXACT_MATCH.of([answer]) == TOKEN_F1.of([answer]) == 100
    answer = Answer("2", "sqa", "", "in the city of Denver", ["Denver, Colorado"])
    assert EXACT_MATCH.of([answer]) == 0
    assert TOKEN_F1.of([answer]) == pytest.approx(100 * 2 * 1 / (4 + 2))
    assert TOKEN_F1.of([Answer("3", "sqa", "", "the", [""])]) == 100, "nothing equals nothing"
    assert TOKEN_F1.of([Answer("4", "sqa", "", "the", ["cat"])]) == 0
