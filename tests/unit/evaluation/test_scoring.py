import random
from collections import Counter

import pytest

from mowe_ray.evaluation.scoring import exact_match, majority_score, normalise, score, word_accuracy, word_f1

WORDS = ["zero", "one", "two", "three"]


def word_errors(answer: list[str], reference: list[str]) -> int:
    """Fewest insertions, deletions and substitutions, by plain recursion."""
    if not answer or not reference:
        return len(answer) + len(reference)
    if answer[0] == reference[0]:
        return word_errors(answer[1:], reference[1:])
    return 1 + min(
        word_errors(answer[1:], reference),
        word_errors(answer, reference[1:]),
        word_errors(answer[1:], reference[1:]),
    )


@pytest.fixture
def pairs():
    rng = random.Random(0)
    text = lambda least: " ".join(rng.choices(WORDS, k=rng.randint(least, 5)))  # noqa: E731
    return [text(0) for _ in range(40)], [text(1) for _ in range(40)]


def test_word_accuracy_is_one_minus_the_word_errors_of_the_whole_set(pairs):
    answers, references = pairs
    errors = sum(word_errors(a.split(), r.split()) for a, r in zip(answers, references, strict=True))
    expected = 1 - errors / sum(len(r.split()) for r in references)
    assert word_accuracy(answers, references) == pytest.approx(max(0.0, expected), abs=1e-12)
    assert word_accuracy(["one " * 9], ["one"]) == 0.0, "never below zero"


def test_word_f1_is_the_harmonic_mean_of_precision_and_recall(pairs):
    total = 0.0
    for answer, reference in zip(*pairs, strict=True):
        given, wanted = answer.split(), reference.split()
        left = Counter(wanted)
        shared = 0
        for word in given:
            if left[word]:
                left[word] -= 1
                shared += 1
        if shared:
            precision, recall = shared / len(given), shared / len(wanted)
            total += 2 * precision * recall / (precision + recall)
    assert word_f1(*pairs) == pytest.approx(total / len(pairs[1]), abs=1e-12)


def test_texts_are_compared_without_case_and_punctuation():
    assert normalise("  Hello,   WORLD! ") == "hello world"
    assert normalise("?!") == "empty"
    assert score("er", ["Happy.", "sad"], ["happy", "angry"]) == 0.5
    assert score("asr", ["ONE two"], ["one, two."]) == 1.0
    assert score("ac", ["a dog"], ["a dog barks"]) == pytest.approx(0.8)
    assert score("asr", ["", "x"], ["", "x"]) == 1.0
    assert exact_match(["a"], ["a"]) == 1.0


def test_the_majority_is_the_best_constant_answer():
    references = ["yes", "no", "yes", "maybe"]
    assert majority_score("aqa", references) == max(score("aqa", [r] * 4, references) for r in references) == 0.5


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no references"):
        score("asr", [], [])
