"""Multiple choice by words and by letter, tags, and scores apart by category."""

import random
from itertools import pairwise

import numpy as np
import pytest

from mowe_ray.evaluation.metrics.classification import (
    CHOICE_ACCURACY,
    LETTER_ACCURACY,
    letter_of,
    mean_average_precision,
)
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.scoring import majority_score, score, task_scores

VOICES = ["A man", "A woman", "A child", "Two men"]

# What MMAU's and MMAR's own script says of each.
VERDICTS = [
    ("A man", "a man.", True),
    ("A man", "It is a man!", True),
    ("A man", "man", False),  # not every word of the choice
    ("A man", "a man and a woman", False),  # a word that only another choice has
    ("A man", "(A) a man", True),
    ("A man", "a man, not two", False),
    ("A man", "a\nman", True),
    ("A man", "a_man", False),  # one word, as regular expressions know words
    ("A man", "A MAN", True),
    ("A man", "", False),
    ("A man", "...", False),
    ("Two men", "two men", True),
    ("Two men", "men, two of them", True),
]


def choose(right: str, given: str, choices: list[str] = VOICES, task: str = "mcq", **groups: str) -> Answer:
    return Answer("1", task, "Who speaks?", given, [right], choices=choices, groups=groups)


@pytest.mark.parametrize(("right", "given", "verdict"), VERDICTS)
def test_an_answer_has_every_word_of_the_right_choice_and_none_that_only_wrong_ones_have(right, given, verdict):
    assert CHOICE_ACCURACY.of([choose(right, given, [*VOICES, right])]) == 100 * verdict


def test_a_letter_before_the_choice_counts_as_a_word_of_a_choice_that_has_it():
    assert CHOICE_ACCURACY.of([choose("Man", "(A) Man", ["Man", "A woman"])]) == 0  # which is why `mcq` has no letters
    assert CHOICE_ACCURACY.of([choose("Man", "(A) Man", ["Man", "Woman"])]) == 100


def spelled(text: str) -> set[str]:
    """Words without a regular expression: what is not a letter, a digit or an underscore parts them."""
    return set("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split())


def brute_force(right: str, given: str, choices: list[str]) -> bool:
    said = spelled(given)
    forbidden = {word for choice in choices for word in spelled(choice) if word not in spelled(right)}
    return bool(said) and all(word in said for word in spelled(right)) and not any(word in forbidden for word in said)


def test_the_rule_on_made_answers():
    rng = random.Random(3)
    words = ["A", "man", "Two", "men", "the", "dog's", "high-pitched", "café", "3", "snake_case", "B"]
    verdicts = []
    for _ in range(500):
        choices = [" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(rng.randint(2, 5))]
        right = rng.choice(choices)
        given = rng.choice([right, f"It is {right}.", rng.choice(choices), " ".join(rng.choices(words, k=2)), ""])
        verdicts.append(brute_force(right, given, choices))
        assert CHOICE_ACCURACY.of([choose(right, given, choices)]) == 100 * verdicts[-1]
    assert 100 < sum(verdicts) < 400


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            ("B", "B"),
            (" B.\n", "B"),
            ("B. A woman", "B"),
            ("The answer is C.", "C"),
            ("(D)", "D"),
            ("A dog barks", "A"),
        ),
        *(("b", None), ("", None), ("the second", None), ("E", None), ("None", None)),
    ],
)
def test_a_letter_is_the_first_character_or_the_last_but_one(text, letter):
    assert letter_of(text, 4) == letter


def test_the_right_letter_is_that_of_the_choice_and_silence_is_wrong():
    rows = [choose("A woman", "B"), choose("B", "B. A woman"), choose("A woman", "A woman"), choose("A woman", "hm")]
    assert LETTER_ACCURACY.statistics(rows)[:, 0].tolist() == [1, 1, 0, 0]
    assert "1 of 4 answers name no letter" in str(LETTER_ACCURACY.note(rows))
    with pytest.raises(ValueError, match="'A robot' is none of its choices"):
        LETTER_ACCURACY.of([choose("A robot", "B")])
    with pytest.raises(ValueError, match="sample '1' has no choices"):
        CHOICE_ACCURACY.of([choose("A man", "a man", [])])


def test_scores_stand_apart_by_category_and_difficulty():
    rows = [choose("A man", "a man", category="source", difficulty="easy")] * 3
    rows += [choose("A man", "a woman", category="source", difficulty="hard")] * 2
    rows += [choose("A man", "a man", category="count", difficulty="hard")]
    (scored,) = task_scores("mmau", rows, seed=0)
    assert scored.main == "choice_accuracy"
    assert {name: list(values) for name, values in scored.groups.items()} == {
        "category": ["count", "source"],
        "difficulty": ["easy", "hard"],
    }
    assert scored.groups["category"]["source"].samples == 5
    assert scored.groups["category"]["source"].score.value == pytest.approx(60)
    assert scored.groups["difficulty"]["hard"].score.value == pytest.approx(100 / 3)
    assert (score("mcq", rows), majority_score("mcq", rows)) == (pytest.approx(4 / 6), 1)


def average_precision(relevant: list[bool], scores: list[float]) -> float:
    """Sum the steps of the precision-recall curve, threshold by threshold."""
    points = [(0.0, 1.0)]
    for threshold in sorted(set(scores), reverse=True):
        chosen = [is_right for is_right, value in zip(relevant, scores, strict=True) if value >= threshold]
        points.append((sum(chosen) / sum(relevant), sum(chosen) / len(chosen)))
    return sum((recall - before) * precision for (before, _), (recall, precision) in pairwise(points))


def test_map_is_the_mean_of_the_average_precision_of_each_tag():
    rng = random.Random(5)
    tags = ["dog", "rain", "engine", "engine idling", "never"]
    rows, right, given = [], [], []
    for i in range(60):
        right.append({tag for tag in tags[:4] if rng.random() < 0.3} or {"dog"})
        given.append({tag for tag in tags if rng.random() < 0.3})
        rows.append(Answer(str(i), "tags", "", ", ".join(given[-1]), sorted(right[-1])))
    expected = np.mean(
        [average_precision([tag in r for r in right], [float(tag in g) for g in given]) for tag in tags[:4]]
    )
    assert mean_average_precision(tags).of(rows) == pytest.approx(100 * expected)
    assert 0.2 < score("tags", rows) < 0.9
