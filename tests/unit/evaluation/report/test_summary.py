"""Models side by side: what counts as a difference, and what is said of it."""

from dataclasses import replace

import pytest

from mowe_ray.evaluation.report.summary import (
    against_majority,
    gain,
    headline,
    listed,
    metric_rows,
    not_computed,
    score,
    signed,
    table,
    test_set_names,
    verdict,
)
from mowe_ray.evaluation.results import Difference, Interval
from tests.made_evaluation import (
    BUILTIN,
    EVALUATIONS,
    GAINS,
    METRICS,
    TASKS,
    around,
    collapsed,
    evaluation,
    many_datasets,
    model,
    one_model,
    scores,
    three_models,
    two_models,
    unavailable,
)

test_set_names.__test__ = False  # a function of ours, no test


def test_lines_hold_every_metric_in_order_and_know_the_main_one():
    found = metric_rows(three_models())
    assert [(line.task, line.metric) for line in found] == [(task, name) for task in TASKS for name in METRICS[task]]
    assert [line.metric for line in found if line.main] == [next(iter(METRICS[task])) for task in TASKS]
    wer = next(line for line in found if line.metric == "wer")
    assert (wer.title, wer.better, wer.majority) == ("WER (%)", "lower", 97.1)
    assert {name: interval.value for name, interval in wer.scores.items()} == pytest.approx(
        {"no-pool": 34.2, "pool": 31.1, "uniform": 32.3}
    )
    assert wer.differences["pool"].value == pytest.approx(-3.1)
    assert set(wer.differences) == {"pool", "uniform"}


def test_a_metric_only_one_model_has_stands_alone():
    one, two, three = metric_rows(unavailable())[-1:] * 3
    assert (one.task, set(one.scores), one.differences) == ("sqa", {"third"}, {})
    assert two.verdict("pool") == three.verdict("third") == ""


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (0.1, 2.0, "higher", "better"),
        (0.1, 2.0, "lower", "worse"),
        (-2.0, -0.1, "higher", "worse"),
        (-2.0, -0.1, "lower", "better"),
        (-0.1, 2.0, "higher", ""),
        (-2.0, 0.1, "lower", ""),
        (0.0, 2.0, "higher", ""),
        (-2.0, 0.0, "lower", ""),
    ],
)
def test_a_difference_counts_where_its_interval_does_not_hold_zero(low, high, better, expected):
    turned = gain(Interval((low + high) / 2, low, high), better)
    assert turned.low <= turned.value <= turned.high
    assert verdict(turned) == expected


def test_the_majority_is_beaten_where_the_interval_says_so():
    found = {row.metric: row for row in metric_rows(one_model())}
    assert against_majority(found["wer"], "pool") == "better"
    assert against_majority(replace(found["wer"], majority=20.0), "pool") == "worse"
    assert against_majority(replace(found["wer"], majority=31.0), "pool") == ""
    assert against_majority(replace(found["wer"], majority=None), "pool") == ""


def by_task(**gains: float) -> list[str]:
    return headline(evaluation([model("base", BUILTIN, {}), model("new", BUILTIN, gains)]))


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        (GAINS, "new beats base on 3 of 5 tasks (ac, asr and er) and is worse on 1 (aqa); on the other they cannot be "
                "told apart."),
        (dict.fromkeys(TASKS, 4.0), "new beats base on all 5 tasks."),
        (dict.fromkeys(TASKS, -4.0), "new is worse than base on all 5 tasks."),
        ({}, "new cannot be told from base on any of 5 tasks."),
        ({"er": -2.0}, "new is worse than base on 1 of 5 tasks (er); on the other 4 they cannot be told apart."),
        ({"er": 1.5}, "new cannot be told from base on any of 5 tasks."),
        ({"er": 1.7}, "new beats base on 1 of 5 tasks (er); on the other 4 they cannot be told apart."),
    ],
)  # fmt: skip
def test_the_headline_says_no_more_than_the_intervals(gains, said):
    assert by_task(**gains) == [said]


def test_the_headline_begins_with_the_best_model_and_tells_the_cost():
    first, second, *costs = headline(three_models())
    assert first.startswith("pool beats no-pool on 3 of 5 tasks")
    assert second.startswith("uniform beats no-pool on 2 of 5 tasks (asr and er)")
    assert costs[0] == "A clip runs 1.25 M parameters of pool, 1.24 times those of no-pool and 1.31 times its GFLOPs."
    assert headline(many_datasets())[0].startswith("pool beats no-pool on 8 of 11 test sets (librispeech_test_clean · ")
    worse = replace(three_models(), baseline="pool", differences=[])
    assert headline(worse)[0] == "no-pool and pool have no scored samples in common."


def test_one_model_is_held_against_the_majority():
    said = headline(one_model())
    assert said[0] == "pool beats the most frequent answer on all 5 tasks."
    assert said[3] == "asr: WER (%) 31.10 [28.70, 33.50], the most frequent answer 97.10; lower is better."
    alone = evaluation([model("m", {"d": ["er"]}, {})])
    assert headline(alone)[0] == "m beats the most frequent answer on er."
    unknown = replace(alone.models[0], scores=[replace(scores({"d": ["er"]}, {})[0], majority={})])
    assert headline(evaluation([unknown])) == ["er: accuracy (%) 58.30 [55.90, 60.70]; higher is better."]
    assert headline(evaluation([replace(unknown, scores=[])])) == ["Nothing of m was scored."]


def test_what_is_missing_is_said_once():
    assert not_computed(unavailable()) == [
        "no meteor for builtin ac: needs WordNet; install it with nltk.download('wordnet') (no-pool, pool)",
        "no judge for builtin aqa: judge.base_url is not set (no-pool, pool)",
        "no judge for builtin sqa: judge.base_url is not set (no-pool, pool)",
        "samples of builtin that could not be used: 2 silent, 1 missing file (no-pool, pool)",
    ]
    same = unavailable()
    assert (
        not_computed(replace(same, models=same.models[:2]))[1] == "no judge for builtin aqa: judge.base_url is not set"
    )


def test_the_table_for_the_terminal():
    assert table(two_models()).splitlines()[0].split("  ")[-1] == "pool - no-pool"
    small = evaluation([model("base", {"d": ["asr"]}, {}), model("new", {"d": ["asr"]}, {"asr": 3.1})])
    assert table(small) == (
        "  dataset  task  metric   better  samples  majority  base                  new                   new - base\n"
        "  d        asr   WER (%)  lower   300      97.10     34.20 [31.80, 36.60]  31.10 [28.70, 33.50]  "
        "-3.10 [-4.70, -1.50] better\n"
        "  [low, high]: 95 % interval over samples; majority: always the most frequent answer\n"
    )


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_has_a_table(name):
    written = table(EVALUATIONS[name])
    assert "nan" not in written
    assert "None" not in written
    assert written.endswith("\n")


def test_the_table_warns():
    assert "  warning: The data-dependent router has collapsed: 100 % of" in table(collapsed())
    assert "warning" not in table(one_model())
    assert "  note: no judge for builtin aqa" in table(unavailable())


def test_models_with_other_numbers_of_samples_show_both():
    first, second = two_models().models
    fewer = replace(second, scores=[replace(task, samples=250) for task in second.scores])
    difference = Difference("pool", "builtin", "asr", "wer", around(-3.0, 1.0), 250)
    row = table(replace(two_models(), models=[first, fewer], differences=[difference])).splitlines()[3]
    assert "250-300" in row
    assert "-3.00 [-4.00, -2.00] better" in row


def test_numbers_and_names():
    assert [score(v) for v in (None, float("nan"), -0.001, 3.14159, -2)] == ["–", "–", "0.00", "3.14", "-2.00"]
    assert [signed(v) for v in (1.0, -1.0, 0.0, 0.001, -0.001)] == ["+1.00", "-1.00", "0.00", "0.00", "0.00"]
    assert [listed(list("abcdef"[:n]), 5) for n in (0, 1, 2, 5, 6)] == [
        "", "a", "a and b", "a, b, c, d and e", "a, b, c, d and 2 more",
    ]  # fmt: skip
    assert list(test_set_names([("d", "asr"), ("d", "er")]).values()) == ["asr", "er"]
    assert list(test_set_names([("d", "asr"), ("er", "er")]).values()) == ["d · asr", "er"]
