import math
import random
from dataclasses import replace

import pytest

from mowe_ray.evaluation.metrics.metric import mean_metric
from mowe_ray.evaluation.metrics.registry import DatasetMetrics, check_names, metrics_of
from mowe_ray.evaluation.metrics.text_overlap import CER, EXACT_MATCH, TOKEN_F1, WER, wer
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.scoring import majority_score, score, task_scores
from tests.made_answers import answers_of, labelled_answers, near

JUDGE = mean_metric("judge", "judge (points)", lambda answer: 0.4)


def rows_of(task: str, *pairs: tuple[str, str]) -> list[Answer]:
    return [Answer(str(i), task, "", answer, [reference]) for i, (answer, reference) in enumerate(pairs)]


def names(metrics) -> list[str]:
    return [metric.name for metric in metrics]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("asr", ["wer", "cer"]),
        ("er", ["accuracy", "unweighted_accuracy", "macro_f1"]),
        ("aqa", ["exact_match", "token_f1"]),
        ("sqa", ["exact_match", "token_f1"]),
        ("my_task", ["exact_match", "token_f1"]),
    ],
)
def test_every_task_has_its_usual_metrics(task, expected):
    metrics, unavailable = metrics_of(task, answers_of(task, 3))
    assert (names(metrics), unavailable) == (expected, {})


def test_captions_have_four():
    metrics, unavailable = metrics_of("ac", answers_of("ac", 3))
    assert set(names(metrics)) | set(unavailable) == {"cider_d", "meteor", "rouge_l", "chrf"}
    assert names(metrics)[0] == "cider_d"


def test_chosen_names_come_in_their_order_and_once():
    metrics, _ = metrics_of("asr", answers_of("asr", 3), names=["token_f1", "wer", "token_f1"])
    assert names(metrics) == ["token_f1", "wer"]


def test_metrics_made_elsewhere_follow_the_usual_or_stand_where_they_are_named():
    rows = answers_of("aqa", 3)
    assert names(metrics_of("aqa", rows, extra=[JUDGE])[0]) == ["exact_match", "token_f1", "judge"]
    assert names(metrics_of("aqa", rows, names=["judge", "wer"], extra=[JUDGE])[0]) == ["judge", "wer"]
    assert names(metrics_of("aqa", rows, names=["wer"], extra=[JUDGE])[0]) == ["wer"]


def test_a_judge_joins_the_usual_metrics_of_the_tasks_it_is_for():
    chosen = DatasetMetrics(made={"judge": JUDGE, "judge_binary": replace(JUDGE, name="judge_binary")})
    assert names(chosen.of("er", labelled_answers(3))[0])[-1] == "judge_binary"
    assert names(chosen.of("asr", answers_of("asr", 3))[0]) == ["wer", "cer"]
    named = replace(chosen, names=["judge_binary"])
    assert names(named.of("sqa", answers_of("sqa", 3))[0]) == ["judge_binary"]


def test_a_judge_that_was_not_set_up_is_unavailable():
    metrics, unavailable = metrics_of("aqa", answers_of("aqa", 3), names=["judge_binary", "wer"])
    assert names(metrics) == ["wer"]
    assert "judge.base_url" in unavailable["judge_binary"]


def test_an_unknown_metric_names_its_key_and_the_nearest():
    with pytest.raises(ValueError, match=r"data.validation.N.metrics: 'macrof1' is no metric, did you mean macro_f1\?"):
        metrics_of("er", labelled_answers(3), names=["accuracy", "macrof1"])
    with pytest.raises(ValueError, match=r"data.validation.2.metrics: 'zzz' is no metric, known are wer, cer"):
        check_names(["zzz"], key="data.validation.2.metrics")
    check_names(None)
    check_names(["judge", "chrf"])


def test_a_dataset_is_scored_task_by_task():
    rows = answers_of("asr", 40) + labelled_answers(50)
    random.Random(0).shuffle(rows)
    english = DatasetMetrics(language="en")
    asr, er = task_scores("mix", rows, english, seed=0)
    assert (asr.dataset, asr.task, asr.samples, asr.main) == ("mix", "asr", 40, "wer")
    assert (er.task, er.samples, er.main) == ("er", 50, "accuracy")
    assert asr.scores["wer"].value == WER.of([row for row in rows if row.task == "asr"])
    assert asr.scores["wer"].low < asr.scores["wer"].value < asr.scores["wer"].high
    assert asr.titles == {"wer": "WER (%)", "cer": "CER (%)"}
    assert asr.better == {"wer": "lower", "cer": "lower"}
    assert task_scores("mix", rows, english, seed=0) == [asr, er] != task_scores("mix", rows, english, seed=1)


def test_the_majority_always_gives_the_most_frequent_first_reference():
    rows = [
        Answer(str(i), "aqa", "", "?", r)
        for i, r in enumerate([["yes", "a"], ["yes", "b"], ["no", "yes", "b"], ["maybe", "c"]])
    ]
    (scores,) = task_scores("qa", rows, DatasetMetrics(made={"judge": JUDGE}), seed=0)
    assert scores.majority == {"exact_match": 75, "token_f1": 75}, "a judge is not asked about it"
    assert scores.scores["judge"].value == pytest.approx(40)


def test_labels_can_be_closed():
    rows = [Answer("1", "er", "", "sad or bored", ["sad"]), Answer("2", "er", "", "sad", ["sad"])]
    assert task_scores("e", rows, seed=0)[0].scores["accuracy"].value == 100
    assert task_scores("e", rows, DatasetMetrics(labels=["sad", "bored"]), seed=0)[0].scores["accuracy"].value == 50


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(ValueError, match="sample 'x' of mine has no reference answer"):
        task_scores("mine", [Answer("x", "asr", "", "hello", [])], seed=0)
    with pytest.raises(ValueError, match=r"data.validation.N.metrics: none is left to score mine: judge needs a judge"):
        task_scores("mine", answers_of("aqa", 2), DatasetMetrics(names=["judge"]), seed=0)


@pytest.mark.parametrize(("task", "metric"), [("aqa", EXACT_MATCH), ("ac", TOKEN_F1), ("mine", EXACT_MATCH)])
def test_the_score_while_training_is_the_metric_of_the_evaluation(task, metric):
    rows = answers_of(task)
    found = score(task, rows)
    assert found == pytest.approx(metric.of(rows) / 100)
    assert 0 < found < 1


def test_transcripts_score_one_minus_the_word_error_rate_and_never_below_zero():
    rng = random.Random(0)
    rows = answers_of("asr", 50)
    given = [replace(row, answer=near(rng, row.references[0])) for row in rows]
    assert score("asr", given) == pytest.approx(1 - wer(given).of(given) / 100)
    assert score("asr", rows_of("asr", ("one dog " * 9, "dog"))) == 0.0
    assert score("asr", rows_of("asr", ("ONE cat", "one, cat."), ("", ""))) == 1.0


def test_emotions_score_when_the_answer_holds_the_label():
    given = rows_of("er", ("Happy.", "happy"), ("the voice is sad", "sad"), ("sad", "angry"))
    assert score("er", given) == pytest.approx(2 / 3)


def test_the_majority_is_the_best_constant_answer():
    rows = rows_of("aqa", *(("?", reference) for reference in ("yes", "no", "yes", "maybe")))
    constants = [score("aqa", [replace(row, answer=other.references[0]) for row in rows]) for other in rows]
    assert majority_score("aqa", rows) == max(constants) == 0.5


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        score("asr", [])


def test_every_statistic_is_finite_and_one_row_per_answer():
    rows = answers_of("asr", 20)
    for metric in (WER, CER, *metrics_of("ac", rows)[0]):
        statistics = metric.statistics(rows)
        assert len(statistics) == 20
        assert math.isfinite(metric.of(rows))
        assert metric.of(rows) == pytest.approx(float(metric.value(statistics[::2].sum(0) + statistics[1::2].sum(0))))
