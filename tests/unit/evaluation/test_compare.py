"""What answers amount to: paired differences, ablations and costs, against sums done by hand."""

from dataclasses import replace

import pytest

from mowe_ray.evaluation.compare import AnsweredModel, compare
from mowe_ray.evaluation.metrics.registry import DatasetMetrics
from mowe_ray.evaluation.predictions import Answer, RouterChoice

METRICS = {"set": DatasetMetrics()}


def answers(right: str, *, member: int | None = 0) -> list[Answer]:
    """Answers to yes-or-no questions; a 1 in `right` is one that is right."""
    choice = None if member is None else RouterChoice([float(i == member) for i in range(2)], [0.5, 0.5])
    return [
        Answer(str(i), "aqa", "?", "yes" if good == "1" else "no", ["yes"], 1.0, choice, choice)
        for i, good in enumerate(right)
    ]


def model(name: str, right: str, **changes) -> AnsweredModel:
    made = AnsweredModel(
        name, f"/{name}", ["a", "b"], 10.0, 5.0, 2.0, 0.1, [], {"set": answers(right)}, {}, {}
    )  # fmt: skip
    return replace(made, **changes)


def compared(*models: AnsweredModel, baseline: str | None = None):
    return compare(models, metrics=METRICS, baseline=baseline, seed=0, device="here")


def test_a_model_is_compared_on_the_samples_that_both_answered():
    more = model("more", "1111")
    fewer = model("fewer", "0100", answers={"set": [a for a in answers("0100") if a.id != "3"]})
    (difference,) = compared(fewer, more, baseline="fewer").differences
    assert (difference.model, difference.samples, difference.metric) == ("more", 3, "exact_match")
    assert difference.difference.value == pytest.approx(100 - 100 / 3)
    (other,) = compared(fewer, more, baseline="more").differences
    assert other.difference.value == -difference.difference.value


def test_the_baseline_is_the_one_without_a_pool_unless_named():
    pool, none = model("pool", "11"), model("none", "10", members=[], answers={"set": answers("10", member=None)})
    assert compared(pool, none).baseline == "none"
    assert compared(pool, none, baseline="pool").baseline == "pool"
    assert compared(pool, replace(none, members=["a", "b"])).baseline == "pool"


def test_an_ablation_is_the_score_without_a_member_and_what_it_changes():
    without = {"a": {"set": answers("1000")[:2]}, "b": {"set": answers("11")}}
    (evaluated,) = compared(model("m", "1100", without=without)).models
    first, second = evaluated.ablation
    assert (first.member, first.score, first.change.value, first.samples) == ("a", 50.0, -50.0, 2)
    assert (second.member, second.score, second.change.value) == ("b", 100.0, 0.0)


def test_encoders_have_their_utilization_and_shapley_values() -> None:
    without = {"a": {"set": answers("0010")}, "b": {"set": answers("1000")}}
    subsets = {frozenset(): {"set": answers("0000")}, frozenset({0}): without["b"], frozenset({1}): without["a"]}
    (evaluated,) = compared(model("m", "1110", without=without, subsets=subsets)).models
    assert [one.utilization for one in evaluated.ablation] == pytest.approx([2 / 3, 2 / 3])
    assert [(one.member, one.value.value) for one in evaluated.shapley] == [("a", 37.5), ("b", 37.5)]
    assert (evaluated.shapley[0].subsets, evaluated.shapley[0].is_exact, evaluated.shapley[0].samples) == (4, True, 4)
    pools = {tuple(one.members): (one.score, one.samples) for one in evaluated.pools}
    assert pools == {(): (0.0, 4), ("a",): (0.25, 4), ("b",): (0.25, 4), ("a", "b"): (0.75, 4)}


def test_every_model_has_its_scores_and_a_router_report_if_it_routes():
    pool, none = compared(
        model("pool", "1100"), model("none", "1000", members=[], answers={"set": answers("1000", member=None)})
    ).models
    assert [scores.scores["exact_match"].value for scores in (*pool.scores, *none.scores)] == [50.0, 25.0]
    assert pool.router_report["datasets"]["set"]["aqa"]["dependent"]["load"] == {"a": 1.0, "b": 0.0}
    assert none.router_report is None
    assert (pool.stored, pool.active, pool.gflops) == (10.0, 5.0, 2.0)
