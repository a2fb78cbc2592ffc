from collections import Counter

import pytest

from mowe_ray.evaluation.generation import instruction_of

LABELS = ["happy", "sad"]


@pytest.mark.parametrize("task", ["asr", "ac", "er"])
def test_the_usual_phrasings_are_drawn_evenly_by_id(task):
    drawn = Counter(instruction_of(task, f"clip-{i}", LABELS, seed=0) for i in range(800))
    assert len(drawn) == 8
    assert min(drawn.values()) > 60


def test_the_draw_depends_on_the_seed_and_the_id_alone():
    one = [instruction_of("asr", str(i), None, seed=1) for i in range(50)]
    assert one == [instruction_of("asr", str(i), LABELS, seed=1) for i in reversed(range(50))][::-1]
    assert one != [instruction_of("asr", str(i), None, seed=2) for i in range(50)]
    assert instruction_of("asr", "clip", None, seed=0) == "Note down the spoken sentence."  # in every process


def test_a_classification_names_its_labels():
    assert all(str(instruction_of("er", str(i), LABELS, 0)).endswith(" (happy, sad)") for i in range(20))
    assert instruction_of("er", "1", None, 0) is None
    assert "happy" not in str(instruction_of("ac", "1", LABELS, 0))


@pytest.mark.parametrize("task", ["aqa", "sqa", "mine"])
def test_questions_of_their_own_stay(task):
    assert instruction_of(task, "1", LABELS, seed=0) is None
