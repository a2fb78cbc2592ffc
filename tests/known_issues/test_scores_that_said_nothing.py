"""Scores that were right or wrong whatever was answered: 0 % WER of wrong Hindi words, 100 % for silence.

Reports: kurianbenoy/whisper_normalizer#25, openai/whisper#858 and #2849 (vowel signs); OpenBMB/UltraRAG#509,
stanfordnlp/dspy#10066, stanford-crfm/helm#3257 (articles); tylin/coco-caption#9 (CIDEr of one sample).
"""

import json

import pytest

from mowe_ray.evaluation.metrics.registry import metrics_of
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.report.summary import table
from mowe_ray.evaluation.results import EvaluatedModel, Evaluation
from mowe_ray.evaluation.scoring import score, task_scores
from mowe_ray.evaluation.text_normalization import normalise_any_transcript, normalise_transcript, plain, seems_english

ENGLISH = "She said that the café is open, and they were naïve."
SENTENCES = {
    "de": "Das schöne Mädchen überquert die große Straße.",
    "fr": "L'été a été très agréable à la forêt.",
    "es": "El niño mañana comerá en el jardín también.",
    "vi": "Tôi muốn ăn phở bò ở Hà Nội.",
    "hi": "दिन में सूरज की किरणें आती हैं",
    "ta": "காலை வணக்கம் நண்பர்களே",
    "ru": "Сегодня хорошая погода в городе.",
    "zh": "今天天气很好我们去公园",
    "ja": "今日はとても良い天気です",
    "th": "วันนี้อากาศดีมาก",
}


def answers(task: str, *pairs: tuple[str | list[str], str]) -> list[Answer]:
    """Answers of (references, what was given)."""
    rows = [(right if isinstance(right, list) else [right], given) for right, given in pairs]
    return [Answer(str(i), task, "q", given, right) for i, (right, given) in enumerate(rows)]


def value(name: str, rows: list[Answer], language: str | None = None) -> float:
    metrics, _ = metrics_of(rows[0].task, rows, names=[name], language=language)
    return metrics[0].of(rows)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("दिन", "दान"),
        ("कि", "का"),
        ("கா", "கி"),
        ("বই", "বাই"),
        ("má", "mạ"),
        ("schön", "schon"),
        ("où", "ou"),
        ("ที่", "ที"),
        ("й", "и"),
    ],
)
def test_marks_and_accents_count(right: str, wrong: str) -> None:
    rows = answers("asr", (right, wrong))
    assert value("wer", rows) > 0
    assert value("cer", rows) > 0
    assert value("wer", answers("asr", (right, right))) == 0


def test_how_many_errors_there_are() -> None:
    # 1 of 6 words; 1 of 29 characters, spaces among them.
    rows = answers("asr", ("दिन में सूरज की किरणें आती", "दान में सूरज की किरणें आती"))
    assert value("wer", rows) == pytest.approx(100 / 6)
    assert value("cer", rows) == pytest.approx(100 / len("दिन में सूरज की किरणें आती"))


def test_a_plain_word_for_an_accented_one_is_noted_where_the_language_is_unknown_and_counted_where_it_is_not() -> None:
    rows = answers("asr", ("schon", "schön"))
    assert value("wer", rows) == 0
    (found,) = task_scores("d", rows, seed=0)
    assert "data.validation.N.language" in found.notes["wer"]
    assert value("wer", rows, "de") == value("wer", rows, "de-AT") == 100
    assert value("wer", answers("asr", ("er ist um zehn da", "ist zehn da")), "de") == 40, "er and um are no fillers"


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_are_told_from_english(language: str) -> None:
    assert not seems_english([SENTENCES[language]])
    assert not seems_english([SENTENCES[language], "okay"])
    assert not seems_english([SENTENCES["zh"], ENGLISH])  # a mixed set must not lose its marks


@pytest.mark.parametrize("text", [ENGLISH, "hello", "two hundred dollars", "the piñata and the jalapeño of it"])
def test_english_is_scored_as_before(text: str) -> None:
    assert seems_english([text])
    given = text.replace("é", "e").replace("ï", "i").replace("ñ", "n").upper()
    rows = answers("asr", (text, given), ("colour, it's 2", "color it is two"))
    assert value("wer", rows) == 0
    (found,) = task_scores("d", rows, seed=0)
    assert found.normalisers == {"wer": "english", "cer": "english"}
    assert normalise_transcript(text) == normalise_transcript(given)


@pytest.mark.parametrize(
    ("right", "given", "wer", "cer"),
    [
        ("今天天气很好", "今天天汽很好", 100 / 6, 100 / 6),
        ("今天 天气 很好。", "今天天气很好", 0, 0),
        ("我 love 你", "我love他", 100 / 3, 100 / 6),
        ("วันนี้", "วันนี", 100 / 6, 100 / 6),
        ("한국어 노래", "한국어 놀이", 50, 2 / 6 * 100),
    ],
)
def test_scripts_without_spaces_are_counted_by_characters(right: str, given: str, wer: float, cer: float) -> None:
    rows = answers("asr", (right, given))
    assert value("wer", rows) == pytest.approx(wer)
    assert value("cer", rows) == pytest.approx(cer)
    assert score("asr", rows) == pytest.approx(1 - wer / 100)


def test_the_rules_are_in_scores_and_table() -> None:
    scores = task_scores("hindi", answers("asr", ("दिन", "दान")), seed=0)
    assert scores[0].normalisers == {"wer": "any language", "cer": "any language"}
    model = EvaluatedModel("m", "f", [], 1, 1, None, None, scores)
    assert "accents and vowel signs count" in table(Evaluation([model], "m", [], "CPU"))
    assert "accents and vowel signs count" in json.dumps(scores[0].notes)


def test_any_language_is_compared_without_case_punctuation_and_forms_of_writing() -> None:
    assert normalise_any_transcript("Straße, ÜBER!  [laughs] e\u0301") == "straße über é"
    assert normalise_any_transcript("ＡＢＣ１２") == "abc12"
    assert normalise_any_transcript("की\u200d या") == "की या"
    assert normalise_any_transcript(" … ") == "empty"
    assert normalise_any_transcript("İstanbul") == plain("İstanbul") == "istanbul"


@pytest.mark.parametrize(
    ("right", "wrong"), [("A", ""), ("A", "the"), ("the", ""), ("+", "-"), ("...", ""), ("An", "A")]
)
def test_what_is_only_an_article_or_a_sign_is_an_answer(right: str, wrong: str) -> None:
    for name in ("exact_match", "token_f1"):
        assert value(name, answers("aqa", (right, wrong))) == 0
        assert value(name, answers("aqa", (right, right), (right, f" {right.lower()} "))) == 100
    assert value("exact_match", answers("aqa", ("A", "a."), ("The dog", "dog!"))) == 100


def test_labels_that_are_signs_are_different_labels() -> None:
    rows = answers("er", ("+", "-"), ("-", "-"))
    assert value("accuracy", rows) == 50


@pytest.mark.parametrize("clips", [1, 3])
def test_cider_of_clips_that_are_all_alike_says_why_it_is_zero(clips: int) -> None:
    rows = answers("ac", *[(["a dog barks", "a dog is barking"], "a dog barks")] * clips)
    (found,) = task_scores("d", rows, seed=0)
    assert found.scores["cider_d"].value == 0
    assert "inverse document frequency" in found.notes["cider_d"].replace("\n", " ")
    model = EvaluatedModel("m", "f", [], 1, 1, None, None, [found])
    assert "no word is rare" in table(Evaluation([model], "m", [], "CPU"))
    others = [*rows, *answers("ac", (["rain falls"], "rain falls"))]
    (found,) = task_scores("d", others, seed=0)
    assert "cider_d" not in found.notes
    assert found.scores["cider_d"].value > 0
