import random
import string

import pytest

from mowe_ray.evaluation.text_normalization import (
    caption_words,
    expand_contractions,
    normalise_answer,
    normalise_transcript,
    plain,
    remove_bracketed,
    remove_fillers,
    spell_numbers,
)
from tests.made_answers import some_text

NUMBER_WORDS = {0: "zero", 1: "one", 7: "seven", 10: "ten", 13: "thirteen", 19: "nineteen", 20: "twenty", 90: "ninety"}


@pytest.mark.parametrize(("number", "word"), NUMBER_WORDS.items())
def test_small_numbers_and_tens_become_words(number, word):
    assert spell_numbers(f"at {number} o'clock") == f"at {word} o'clock"


def test_only_whole_numbers_that_have_one_word_become_words():
    assert spell_numbers("21 100 1990 10th b2b 007") == "21 100 1990 10th b2b 007"
    written = spell_numbers(" ".join(map(str, range(101))))
    assert sum(word.isalpha() for word in written.split()) == 21 + 7


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("i'm", "i am"),
        ("they're", "they are"),
        ("that's", "that is"),
        ("it's", "it is"),
        ("you've", "you have"),
        ("isn't", "is not"),
        ("hadn't", "had not"),
        ("don't", "do not"),
    ],
)
def test_contractions_are_written_in_full(short, full):
    assert expand_contractions(f"well {short} so") == f"well {full} so"


def test_other_apostrophes_stay():
    assert expand_contractions("the dog's bone, o'clock") == "the dog's bone, o'clock"


@pytest.mark.parametrize("brackets", ["()", "[]", "{}", "<>"])
def test_what_stands_in_brackets_is_taken_out(brackets):
    opening, closing = brackets
    assert remove_bracketed(f"yes {opening}laughs{closing} no") == "yes  no"
    assert remove_bracketed(f"a{opening}b{opening}c{closing}d{closing}e") == "ae", "nested"
    assert remove_bracketed(f"a {opening} b") == f"a {opening} b", "never closed"


def test_fillers_are_taken_out_as_words_only():
    assert remove_fillers("uh umm um er ah").split() == []
    assert remove_fillers("under the umbrella, ahead of her") == "under the umbrella, ahead of her"


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("Mr. Smith's got 2 dogs!", "mister smith has got two dogs"),
        ("I won't; can't, shan't", "i will not can not sha not"),
        ("twenty-one birds, twenty and three", "21 birds twenty and three"),
        ("nineteen hundred and six", "1906"),
        ("She's 20% of 100", "she is twenty of 100"),
        ("It's noon, <unk> [noise] (coughs) isn't it?", "it is noon is not it"),
        ("The colour grey", "the color gray"),
        ("uh, um, er... ah", "empty"),
        ("  Zoë's  CAFÉ ", "zoe is cafe"),
        ("", "empty"),
        ("?!", "empty"),
    ],
)
def test_transcripts_go_through_whispers_rules_and_then_audiobenchs(said, compared):
    assert normalise_transcript(said) == compared


def test_a_normalised_transcript_is_never_empty_and_has_single_spaces():
    rng = random.Random(1)
    for _ in range(300):
        text = normalise_transcript(some_text(rng))
        assert text
        assert text.split() == text.split(" ")


def squad(text: str) -> str:
    """The rule of SQuAD, letter by letter; what it would leave nothing of stays."""
    kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    words = [word for word in kept.split() if word not in ("a", "an", "the")]
    return " ".join(words or kept.split() or text.lower().split())


def test_answers_are_compared_without_case_punctuation_and_articles():
    rng = random.Random(2)
    texts = [some_text(rng) for _ in range(300)] + ["The  An a", "U.S.A.", "an-other theme", ""]
    assert [normalise_answer(text) for text in texts] == [squad(text) for text in texts]
    assert normalise_answer("The Eiffel Tower!") == "eiffel tower"
    assert normalise_answer("a theatre, an anagram") == "theatre anagram"


def test_plain_text_keeps_every_script_and_drops_marks():
    assert plain("  Hello,   WORLD!—€5 ") == "hello world 5"
    assert plain("नमस्ते, दुनिया।") == "नमस्ते दुनिया", "vowel signs are no punctuation"
    assert plain("cafe\u0301") == plain("CAFÉ") == "café"
    assert plain("STRASSE") == plain("Straße")
    assert caption_words("A dog's high-pitched bark...") == ["a", "dog", "s", "high", "pitched", "bark"]
    assert caption_words(" .") == []
