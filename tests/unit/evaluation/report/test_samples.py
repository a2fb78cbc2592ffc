"""The samples of a report: which come first, what is marked in an answer, and clips that can be heard."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from mowe_ray.evaluation.metrics.registry import DatasetMetrics
from mowe_ray.evaluation.metrics.text_overlap import EXACT_MATCH, wer
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.report.samples import confusion_tables, samples_view, word_difference
from mowe_ray.evaluation.samples import encoded_clip, errors_of, shown_samples
from tests.html_page import Page
from tests.made_evaluation import MEMBERS, choice, with_samples


def answered(name: str, said: str, right: str = "a dog barks", sure: float = 0.9) -> Answer:
    return Answer(name, "asr", "?", said, [right], 1.0, None, choice("hubert", MEMBERS, sure), shard="x.tar", path="a")


def test_each_kind_of_sample_is_shown_in_turn() -> None:
    ours = [answered("right", "a dog barks"), answered("unsure", "a dog barks", sure=0.4), answered("worst", "no"),
            answered("bad", "a dog sits")]  # fmt: skip
    theirs = [replace(ours[0], answer="a cat barks"), *ours[1:3], replace(ours[3], answer="a dog barks now")]
    found = shown_samples(
        {"ours": {"d": ours}, "theirs": {"d": theirs}},
        {"ours": MEMBERS, "theirs": MEMBERS},
        {"d": DatasetMetrics()},
        None,
    )
    assert [(sample.id, sample.why) for sample in found] == [
        ("worst", "most errors"), ("right", "models differ"), ("unsure", "right"), ("bad", "router unsure"),
    ]  # fmt: skip
    assert [a.answer for a in found[1].answers] == ["a dog barks", "a cat barks"]
    assert found[1].answers[1].scores["WER (%)"] == pytest.approx(100 / 3)
    assert found[0].answers[0].routing["dependent"][1] == ("hubert", 0.9, True)
    assert found[0].where == "x.tar a"
    fewer = shown_samples({"ours": {"d": ours}}, {"ours": MEMBERS}, {"d": DatasetMetrics()}, 2)
    assert [sample.id for sample in fewer] == ["worst", "right"]


def test_test_sets_take_turns() -> None:
    rows = [answered(f"a{i}", "no") for i in range(5)] + [replace(answered("b", "no"), task="aqa")]
    found = shown_samples({"m": {"d": rows}}, {"m": MEMBERS}, {"d": DatasetMetrics()}, 3)
    assert [sample.task for sample in found].count("aqa") == 1


def test_errors_are_from_right_to_wrong() -> None:
    answers = [answered("1", "a dog barks"), answered("2", "one two three four five six"), answered("3", "a dog")]
    assert errors_of(wer(answers), answers) == [0.0, 1.0, pytest.approx(1 / 3, abs=1e-4)]
    assert errors_of(EXACT_MATCH, answers) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "marked"),
    [
        ("The dog barks!", "The dog barks!"),
        ("the cat barks", "the <del>dog</del> <ins>cat</ins> barks"),
        ("the dog", "the dog <del>barks</del>"),
        ("so the dog barks", "<ins>so</ins> the dog barks"),
        ("something else <b>", "<ins>something else &lt;b&gt;</ins>"),
        ("rain falls", "rain falls"),
        ("", "<del>the dog barks</del>"),
    ],
)
def test_an_answer_is_marked_where_it_differs(answer: str, marked: str) -> None:
    assert word_difference(["the dog barks", "rain falls"], answer) == marked


def test_a_clip_is_a_small_file_that_sounds_the_same() -> None:
    time = np.arange(48_000) / 16_000
    wave = (0.5 * np.sin(2 * np.pi * 440 * time) * (time < 1.5)).astype(np.float32)
    clip = encoded_clip([wave], 30.0)
    assert len(clip.mp3) < 3.3 * 40_000 / 8
    heard, rate = soundfile.read(io.BytesIO(clip.mp3))
    assert rate == 16_000
    assert len(heard) / rate == pytest.approx(3.0, abs=0.2)
    spectrum = np.abs(np.fft.rfft(heard[2000:18_000]))
    assert spectrum.argmax() == pytest.approx(440, abs=2)
    assert min(clip.peaks[:40]) > 90
    assert max(clip.peaks[60:]) < 5
    cut = encoded_clip([wave, wave], 2.0)
    assert cut.is_cut
    assert cut.seconds == 2.0


def test_cards_carry_what_the_page_sorts_and_filters_by() -> None:
    made = with_samples()
    page = Page(samples_view(made))
    cards = [attributes for element, attributes in page.elements if element == "article"]
    assert len(cards) == 17
    assert [card["data-rank"] for card in cards] == [str(i) for i in range(17)]
    assert {card["data-task"] for card in cards} == {"asr", "er"}
    assert json.loads(str(cards[0]["data-ran"]))
    assert sum(card.get("data-heard") == "yes" for card in cards) == 5
    assert {card["data-groups"] for card in cards} == {"{}", '{"difficulty": "easy"}', '{"difficulty": "hard"}'}
    menus = [str(attributes["name"]) for element, attributes in page.elements if element == "select"]
    assert menus == ["task", "encoder", "group difficulty", "show", "sort"]
    tables = Page(confusion_tables(made))
    cells = {a["data-cell"] for element, a in tables.elements if element == "button"}
    assert cells == {cell for card in cards for cell in str(card["data-cells"]).split()}
    counts = [int(text) for text in tables.of("td", "button")]
    assert sum(counts) == 18
