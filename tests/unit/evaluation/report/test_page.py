"""The report of an evaluation as HTML: whole for any evaluation, escaped, and drawn where the numbers say."""

import re
from dataclasses import replace

import pytest

from mowe_ray.evaluation.report.charts import difference_chart, quality_charts
from mowe_ray.evaluation.report.page import report, score_table
from mowe_ray.evaluation.report.router_charts import ablation_charts, drift, independent_choice, load_bars
from mowe_ray.evaluation.report.summary import metric_rows
from mowe_ray.evaluation.results import Ablation, Evaluation, GroupScore, Interval, Shapley
from tests.html_page import Page
from tests.made_evaluation import (
    BUILTIN,
    EVALUATIONS,
    MANY,
    MEMBERS,
    METRICS,
    SHARES,
    answers,
    around,
    collapsed,
    evaluation,
    history,
    many_datasets,
    model,
    one_model,
    pooled,
    routed,
    scores,
    three_models,
    two_models,
    unavailable,
)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_page_is_well_formed_and_alone_for_every_evaluation(name: str) -> None:
    page = Page(report(EVALUATIONS[name]))
    assert page.stands_alone()
    assert page.not_numbers() == []
    assert page.of("p") != []


HEADINGS = {
    "one model": ["Scores", "What the routers chose", "What each encoder is worth", "How certain this is"],
    "two models": ["Scores", "Difference to no-pool", "Quality against cost", "What the routers of pool chose",
                   "What each encoder of pool is worth", "How certain this is"],
    "no pool": ["Scores", "Difference to one", "How certain this is"],  # both cost the same
    "with samples": ["Scores", "Difference to no-pool", "Quality against cost", "What was mistaken for what", "Samples",
                     "What the routers of pool chose", "What each encoder of pool is worth", "How certain this is"],
    "unavailable": ["Scores", "Difference to no-pool", "What is missing", "How certain this is"],
    "empty": [],
}  # fmt: skip


@pytest.mark.parametrize("name", HEADINGS)
def test_sections_are_those_that_have_something_to_show(name: str) -> None:
    assert Page(report(EVALUATIONS[name])).headings() == HEADINGS[name]


def test_what_users_wrote_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    datasets = {evil: ("asr",), f"{evil}2": ("asr",)}
    renamed = [
        replace(task, task=evil, titles=dict.fromkeys(task.titles, evil), unavailable={evil: evil})
        for task in scores(datasets, {})
    ]
    members = [evil, f"{evil}{evil}"]
    routing = routed(datasets, {"asr": {evil: 1.0}}, members=members, always=evil)
    for tasks in routing["datasets"].values():
        tasks[evil] = tasks.pop("asr")
    ablation = [Ablation(member, evil, evil, "wer", 1.0, around(1.0, 0.5), 3) for member in members]
    changes = {
        "members": members, "scores": renamed, "bad": {evil: {evil: 1}}, "ablation": ablation, "router_report": routing,
    }  # fmt: skip
    made = evaluation(
        [
            model(f"0{evil}", datasets, {}, scores=renamed),
            pooled(evil, datasets, **changes),
            pooled(f"2{evil}", datasets, **changes),
        ]
    )
    html = report(replace(made, device=evil))
    page = Page(html)
    assert "<script>alert" not in html
    assert sum(element == "script" for element, _ in page.elements) == 1
    assert sum(evil in text for text in page.texts) >= 20


def test_scores_by_category_have_a_table_of_their_own_with_all_models() -> None:
    by_group = {"difficulty": {"<easy>": GroupScore(7, around(81.5, 2)), "hard": GroupScore(3, around(40.25, 5))}}
    grouped = [replace(task, groups=by_group) for task in scores({"mmau": ("aqa",)}, {})]
    made = evaluation([model("a", {}, {}, scores=grouped), model("b", {}, {}, scores=grouped[:0])])
    html = report(made)
    assert "Scores by group" in Page(html).headings()
    assert "&lt;easy&gt;" in html
    assert html.count("81.50") == html.count("40.25") == 1
    assert "Scores by group" not in Page(report(one_model())).headings()


def cells(evaluated: Evaluation, kind: str) -> int:
    page = Page(score_table(evaluated, metric_rows(evaluated)))
    return sum(element == "td" and attributes.get("class") == kind for element, attributes in page.elements)


@pytest.mark.parametrize("name", ["two models", "three models", "many datasets", "unavailable"])
def test_differences_are_marked_where_their_interval_does_not_hold_zero(name: str) -> None:
    evaluated = EVALUATIONS[name]
    better = {row.metric: row.better for row in metric_rows(evaluated)}
    above = [d for d in evaluated.differences if d.difference.low > 0]
    below = [d for d in evaluated.differences if d.difference.high < 0]
    won = sum(better[d.metric] == "higher" for d in above) + sum(better[d.metric] == "lower" for d in below)
    assert won > 0
    assert cells(evaluated, "n better") == won
    assert cells(evaluated, "n worse") == len(above) + len(below) - won


def test_the_table_has_every_score_with_its_interval() -> None:
    made = three_models()
    texts = Page(score_table(made, metric_rows(made))).texts
    for one in made.models:
        for task in one.scores:
            for found in task.scores.values():
                at = texts.index(f"[{found.low:.2f}, {found.high:.2f}]")
                assert f"{found.value:.2f}" in texts[: at + 1]
    assert texts.count("lower is better") == 2
    assert texts.count("higher is better") == 6
    assert "97.10" in texts


def dots(html: str) -> list[tuple[float, float, bool]]:
    """Place of each row's dot and of its zero, and whether it is hollow."""
    rows = [part for part in html.split("<svg")[1:] if 'class="plot row"' in part and "<circle" in part]
    found = []
    for row in rows:
        (dot,) = re.findall(r'<circle cx="([\d.]+)%"[^>]*class="(dot[^"]*)"', row)
        (zero,) = re.findall(r'<line x1="([\d.]+)%"[^>]*class="axis"', row)
        found.append((float(dot[0]), float(zero), dot[1] == "dot open"))
    return found


def test_right_is_better_whatever_the_metric() -> None:
    made = two_models()
    main = [row for row in metric_rows(made) if row.main]
    places = dots(difference_chart(made, metric_rows(made)))
    assert len(places) == len(main)
    for line, (at, zero, hollow) in zip(main, places, strict=True):
        difference = line.differences["pool"]
        gained = difference.value if line.better == "higher" else -difference.value
        assert (at > zero) == (gained > 0), line.task
        assert hollow == (difference.low <= 0 <= difference.high)
    assert {line.better for line in main} == {"lower", "higher"}
    per_point = [
        (at - zero) / abs(line.differences["pool"].value) for line, (at, zero, _) in zip(main, places, strict=True)
    ]
    assert [abs(scale) for scale in per_point] == pytest.approx([abs(per_point[0])] * len(main), rel=0.05)


def test_an_encoder_is_worth_what_is_lost_without_it() -> None:
    datasets = {"d": ("asr", "er")}
    ablation = [
        Ablation("whisper", "d", "asr", "wer", 40.0, Interval(5.0, 4.0, 6.0), 50),  # more errors without it
        Ablation("hubert", "d", "asr", "wer", 33.0, Interval(-2.0, -3.0, -1.0), 50),
        Ablation("whisper", "d", "er", "accuracy", 50.0, Interval(-5.0, -6.0, -4.0), 50),  # less right without it
        Ablation("hubert", "d", "er", "accuracy", 58.0, Interval(0.5, -1.0, 2.0), 50),
        Ablation("hubert", "gone", "er", "accuracy", 58.0, Interval(0.5, -1.0, 2.0), 50),
    ]
    html = ablation_charts(pooled("pool", datasets, ablation=ablation, shapley=[]))
    sides = [("helps" if at > zero else "harms", hollow) for at, zero, hollow in dots(html)]
    assert sides == [("helps", False), ("harms", False), ("helps", False), ("harms", True)]
    texts = Page(html).texts
    assert ["+5.00" in texts, "\u22125.00" in texts, "change of WER (%) without it, 50 samples" in texts] == [True] * 3
    assert ablation_charts(pooled("pool", datasets, ablation=[])) == ""


def test_shapley_values_and_utilization_stand_beside_what_is_lost() -> None:
    change = Interval(5.0, 4.0, 6.0)
    ablation = [Ablation("whisper", "d", "asr", "wer", 40.0, change, 50, 0.25),
                Ablation("hubert", "d", "asr", "wer", 31.0, change, 50, -0.03)]  # fmt: skip
    shares = [Shapley("whisper", "d", "asr", "wer", Interval(-9.0, -10.0, -8.0), 50, 8, True)]
    html = ablation_charts(pooled("pool", {"d": ("asr",)}, ablation=ablation, shapley=shares))
    sides = [("helps" if at > zero else "harms", hollow) for at, zero, hollow in dots(html)]
    assert sides == [("helps", False)] * 3  # fewer errors with it
    page = Page(html)
    assert page.of("span") != []
    assert {"left out", "Shapley value"} <= set(page.texts)
    assert "CUR: whisper 25 %, hubert \u22123 %; information gap 28 points." in page.texts


def test_each_task_has_its_own_scale() -> None:
    datasets = {"d": ("ac", "er")}
    main = {task: next(iter(METRICS[task])) for task in datasets["d"]}
    ablation = [Ablation("whisper", "d", "ac", main["ac"], 9.0, Interval(-300.0, -310.0, -290.0), 50),
                Ablation("whisper", "d", "er", main["er"], 9.0, Interval(-3.0, -3.1, -2.9), 50)]  # fmt: skip
    (wide, _, _), (small, _, _) = dots(ablation_charts(pooled("pool", datasets, ablation=ablation, shapley=[])))
    assert wide == pytest.approx(small, abs=0.5)


def test_many_charts_are_folded() -> None:
    assert Page(ablation_charts(pooled("pool", MANY))).of("summary") == ["5 more"]
    made = many_datasets()
    assert Page(quality_charts(made, metric_rows(made))).of("summary") == [
        "5 more",
        "The same against GFLOPs",
        "5 more",
    ]


def test_bars_are_as_wide_as_the_counted_shares() -> None:
    html = load_bars(routed(BUILTIN))
    for task in ("asr", "aqa"):
        heard = answers(task, SHARES[task])
        counts = [sum(answer.dependent.load[i] == 1 for answer in heard) for i in range(len(MEMBERS))]
        (bar,) = [part for part in html.split('class="plot bar"')[1:] if f'aria-label="{task}: ' in part]
        widths = re.findall(r'x="[\d.]+%" width="([\d.]+)%"', bar)
        assert [float(width) for width in widths] == pytest.approx([100 * c / len(heard) for c in counts], abs=0.01)
    texts = Page(html).texts
    same = sum(answer.dependent.load == answer.independent.load for answer in answers("ac", SHARES["ac"]))
    assert f"{100 * same / 40:.0f} %" in texts
    assert "same for every clip" in texts


def test_routers_that_are_off_are_said_to_be() -> None:
    page = Page(report(EVALUATIONS["routers off"]))
    assert page.texts.count("The data-dependent router is off.") == 1
    assert page.texts.count("The data-independent router is off.") == 1
    assert independent_choice(routed(BUILTIN)) == (
        "The data-independent router runs hubert (weight 0.92) for every clip; it gives whisper 0.04, hubert-er 0.04."
    )


def test_drift_has_a_curve_for_each_member_and_router() -> None:
    chart = Page(drift(routed(BUILTIN)))
    assert sum(attributes.get("class") == "course" for _, attributes in chart.elements) == 2 * len(MEMBERS) + 2
    assert sum(attributes.get("class") == "front" for _, attributes in chart.elements) == 1
    assert drift({**routed(BUILTIN), "training": []}) == ""
    long = {**routed(BUILTIN), "training": [{"step": r["step"], **r["routing"]} for r in history(steps=3000)]}
    assert len(drift(long)) < 60_000, "thinned"


@pytest.mark.slow
def test_alarms_are_on_the_page_and_a_healthy_router_has_none() -> None:
    def warnings(evaluated: Evaluation) -> int:
        page = Page(report(evaluated))
        return sum(attributes.get("role") == "alert" for _, attributes in page.elements)

    assert warnings(collapsed()) == 2 * 2  # at the top, and where the bars are
    for healthy in (one_model(), three_models(), many_datasets()):
        assert warnings(healthy) == 0


def test_what_is_missing_is_listed() -> None:
    texts = Page(report(unavailable())).of("li")
    assert "no judge for builtin aqa: judge.base_url is not set (no-pool, pool)" in texts
    assert "samples of builtin that could not be used: 2 silent, 1 missing file (no-pool, pool)" in texts


def test_points_stand_where_their_numbers_are() -> None:
    made = three_models()
    chart = quality_charts(made, metric_rows(made)).split("<figure")[1]
    found = re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)" r="5"', chart)
    across, down = ([float(pair[i]) for pair in found] for i in (0, 1))
    costs = [one.active for one in made.models]
    values = [one.scores[0].scores["cider"].value for one in made.models]
    assert sorted(range(3), key=across.__getitem__) == sorted(range(3), key=costs.__getitem__)
    assert sorted(range(3), key=lambda i: -down[i]) == sorted(range(3), key=values.__getitem__)


def test_unknown_costs_leave_a_dash() -> None:
    html = report(evaluation([model("m", BUILTIN, {}, gflops=None, real_time_factor=None)]))
    assert html.count("<b>–</b>") == 2
    assert "GFLOPs per clip" not in report(EVALUATIONS["no pool"]).split("two</b>")[0].split("one</b>")[1]
