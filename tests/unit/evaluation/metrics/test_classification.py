import re
from fractions import Fraction

import pytest

from mowe_ray.evaluation.metrics.classification import accuracy, find_label, labels_of, macro_f1, unweighted_accuracy
from mowe_ray.evaluation.predictions import Answer
from tests.made_answers import LABELS, labelled_answers

KNOWN = ("happy", "very happy", "sad", "neutral", "freude")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def label_in(text: str) -> str | None:
    """The label a text is or holds: words from left to right, the longest label at each place."""
    said, found, i = words(text), set(), 0
    while i < len(said):
        here = [label for label in KNOWN if said[i : i + len(words(label))] == words(label)]
        longest = max(here, key=len, default=None)
        found |= {longest} if longest else set()
        i += len(words(longest)) if longest else 1
    return found.pop() if len(found) == 1 else None


def rightness(answers: list[Answer]) -> list[tuple[str | None, str]]:
    rows = []
    for answer in answers:
        given, right = label_in(answer.answer), [label_in(r) for r in answer.references]
        rows.append((given, given if given in right else right[0]))
    return rows


@pytest.fixture(scope="module")
def answers():
    return labelled_answers()


def test_accuracy_is_the_share_of_right_labels(answers):
    rows = rightness(answers)
    expected = Fraction(sum(given == right for given, right in rows), len(rows))
    assert accuracy(LABELS).of(answers) == pytest.approx(100 * float(expected), abs=1e-9)
    assert 0.2 < expected < 0.8


def test_unweighted_accuracy_is_the_mean_recall_of_labels_that_occur(answers):
    rows = rightness(answers)
    recalls = []
    for label in {right for _, right in rows}:
        mine = [given for given, right in rows if right == label]
        recalls.append(Fraction(mine.count(label), len(mine)))
    assert len(recalls) == 4, "of the five labels one never occurs"
    assert unweighted_accuracy(LABELS).of(answers) == pytest.approx(100 * float(sum(recalls) / len(recalls)), abs=1e-9)


def test_macro_f1_is_the_mean_of_the_labels_f1(answers):
    rows = rightness(answers)
    scores = []
    for label in {name for row in rows for name in row if name}:
        hits = sum(given == right == label for given, right in rows)
        precision = Fraction(hits, max(1, sum(given == label for given, _ in rows)))
        recall = Fraction(hits, max(1, sum(right == label for _, right in rows)))
        scores.append(2 * precision * recall / (precision + recall) if hits else Fraction(0))
    assert len(scores) == 5, "one is answered but never right"
    assert macro_f1(LABELS).of(answers) == pytest.approx(100 * float(sum(scores) / len(scores)), abs=1e-9)


def test_worked_example():
    pairs = [("happy", "happy"), ("happy", "sad"), ("sad", "sad"), ("what?", "sad")]
    rows = [Answer(str(i), "er", "", given, [right]) for i, (given, right) in enumerate(pairs)]
    labels = ["happy", "sad", "angry"]
    assert accuracy(labels).of(rows) == pytest.approx(50)
    assert unweighted_accuracy(labels).of(rows) == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert macro_f1(labels).of(rows) == pytest.approx(100 * (2 / 3 + 2 / 4) / 2)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Happy.", "happy"),
        ("VERY  happy!", "very happy"),
        ("He sounds happy to me", "happy"),
        ("he is very happy", "very happy"),
        ("happy or sad", None),
        ("very happy, happy", None),
        ("sad, so sad", "sad"),
        ("very happy very happy!", "very happy"),
        ("unhappy", None),
        ("happysad", None),
        ("", None),
    ],
)
def test_a_text_is_the_one_label_it_holds(text, label):
    assert find_label(text, KNOWN) == label


def test_a_label_may_begin_like_another():
    assert find_label("it is sad indeed", ("sad", "sad indeed")) == "sad indeed"
    assert find_label("it is sad, and happy indeed", ("sad", "sad indeed")) == "sad"


def test_labels_are_those_of_the_references():
    rows = [Answer("1", "er", "", "", ["Sad.", "happy"]), Answer("2", "er", "", "angry", ["sad"])]
    assert labels_of(rows) == ["happy", "sad"]


def test_a_reference_outside_the_list_is_an_error_that_names_the_key():
    rows = [Answer("x7", "er", "", "sad", ["bored"])]
    with pytest.raises(ValueError, match=r"data.validation.N.labels: happy, sad lack 'bored', .* 'x7'"):
        macro_f1(["happy", "sad"]).of(rows)
    assert accuracy(["happy", "sad"]).of([Answer("1", "er", "", "sad", ["She is sad."])]) == 100
