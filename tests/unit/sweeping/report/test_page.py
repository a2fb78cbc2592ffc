"""The report as HTML: whole for any study, escaped, and drawn where the numbers say."""

from dataclasses import replace

import numpy as np
import pytest

from mowe_ray.output.charts import Axis, spread_out
from mowe_ray.output.html_page import SCRIPT
from mowe_ray.sweeping.analysis.points import points
from mowe_ray.sweeping.report.charts import Colouring, quality_against_cost
from mowe_ray.sweeping.report.page import report
from mowe_ray.sweeping.report.parallel_coordinates import parallel_coordinates
from mowe_ray.sweeping.report.router_charts import heat_map, mean_load
from mowe_ray.sweeping.schema import POOL_KEY, SweepConfig
from mowe_ray.sweeping.trials import History, Trial, Validation, point_label
from tests.html_page import Page
from tests.made_study import failed, grid, histories, history, planted, planted_study, stopped, subsets, sweep, trials

ALL_SECTIONS = [
    "Score against active parameters", "All points at once", "What each factor does", "Learning curves",
    "What the routers chose", "All trials", "Errors", "Train the winner", "How certain this is",
]  # fmt: skip
TOP_K = {"model.router.top_k": {"grid": [1, 2, 3]}}


def top_k_study(count: int = 3, **keys: object) -> tuple[SweepConfig, list[Trial]]:
    config = sweep(TOP_K, **keys)
    designed = grid(model__router__top_k=[1, 2, 3])[:count]
    return config, trials(config, designed, lambda values: 0.5 + 0.1 * values["model.router.top_k"])


def random_study() -> tuple[SweepConfig, list[Trial]]:
    """A hundred points over ranges, a third of them stopped."""
    draw = np.random.default_rng(0)
    space = {"training.learning_rate": {"loguniform": [1e-5, 1e-2]}, POOL_KEY: {"subsets": {"sizes": [0, 1, 2, 3]}}}
    config = sweep(space, search={"kind": "random"}, budget={"points": 100}, objective={"against": "gflops"})
    pools = subsets()
    designed = [
        {"training.learning_rate": float(10 ** draw.uniform(-5, -2)), POOL_KEY: pools[draw.integers(len(pools))]}
        for _ in range(100)
    ]
    made = trials(config, designed, planted)
    return config, [stopped(one) if one.number % 3 == 0 else one for one in made]


def no_numbers() -> tuple[SweepConfig, list[Trial]]:
    config, made = top_k_study(objective={"metric": "loss"})
    return config, [replace(one, loss=float("nan"), cost=None) for one in made]


STUDIES = {
    "planted": planted_study(),
    "one trial": top_k_study(1),
    "no trials": top_k_study(0),
    "all failed": (top_k_study()[0], [failed(one) for one in top_k_study()[1]]),
    "all stopped": (top_k_study()[0], [stopped(one) for one in top_k_study()[1]]),
    "waiting": (top_k_study()[0], [Trial(0, 0, 0, {"model.router.top_k": 1})]),
    "loss": top_k_study(objective={"metric": "loss"}),
    "one task": top_k_study(objective={"metric": "score.er"}),
    "no numbers": no_numbers(),
    "hundred": random_study(),
}


@pytest.mark.parametrize("name", STUDIES)
def test_page_is_well_formed_and_alone_for_every_study(name: str) -> None:
    config, made = STUDIES[name]
    html = report(config, made, histories(made), "model: {}\n", elapsed_s=60.0)
    page = Page(html)
    assert page.stands_alone()
    assert page.not_numbers() == []


def test_full_study_has_every_section_and_one_without_results_only_what_it_knows() -> None:
    config, made = planted_study()
    assert Page(report(config, made, histories(made), "a: 1\n")).headings() == ALL_SECTIONS
    config, made = STUDIES["all failed"]
    assert Page(report(config, made, {}, None)).headings() == ["All trials", "Errors", "How certain this is"]
    assert Page(report(top_k_study()[0], [], {}, None)).headings() == ["How certain this is"]


def test_what_users_wrote_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    space = {evil: {"settings": {evil: {"seed": 1}, "b": {"seed": 2}}}, POOL_KEY: {"pools": [["hubert"]]}}
    config = sweep(space, question=evil, storage=f"runs/{evil}")
    made = trials(config, [{evil: name, POOL_KEY: [evil]} for name in (evil, "b")], lambda _: {evil: 0.5, "er": 0.2})
    made.append(failed(replace(made[0], number=2, point=2), error=evil))
    html = report(config, made, histories(made), evil)
    page = Page(html)
    assert "<script>alert" not in html
    assert sum(element == "script" for element, _ in page.elements) == 1
    assert sum(evil in text for text in page.texts) >= 8


def test_script_is_small() -> None:
    assert len(SCRIPT.strip().splitlines()) <= 40


def test_missing_courses_and_broken_losses_are_left_out() -> None:
    config, made = top_k_study()
    nan = float("nan")
    broken = Validation(20, 1.0, {"er": {"score": nan, "majority": 0, "samples": 1}})
    course = History([Validation(10, nan, {}), broken], [(1, nan), (2, 3.0)])
    page = Page(report(config, made, {0: course}, None))
    assert "Loss in training" in page.texts
    assert "Score on validation" not in page.texts


def test_stopped_and_failed_curves_end_visibly() -> None:
    config, made = planted_study()
    html = report(config, made, histories(made), None)
    assert html.count('class="stop"') == 2 * 2  # in both charts
    assert html.count('class="cross mid"') == 1  # it failed before its first validation
    assert html.count('class="curve winner"') == 2 * 2


def test_points_are_drawn_where_their_numbers_are() -> None:
    config, made = planted_study()
    found = points(config, made)
    chart = Page(quality_against_cost(config, found, Colouring()))
    dots = [attributes for element, attributes in chart.elements
            if element == "circle" and str(attributes["class"]).startswith("dot")]  # fmt: skip
    down = np.array([float(str(dot["cy"])) for dot in dots])
    across = np.array([float(str(dot["cx"]).rstrip("%")) for dot in dots])
    means, costs = np.array([p.mean for p in found], dtype=float), np.array([p.active for p in found])
    # Straight lines from numbers to places, upwards for scores.
    assert np.corrcoef(means, down)[0, 1] == pytest.approx(-1, abs=1e-4)
    assert np.corrcoef(costs, across)[0, 1] == pytest.approx(1, abs=1e-4)
    assert sum(dot["class"] == "dot open" for dot in dots) == 3  # those with a seed that did not finish


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([0.1, 0.7], False),
        ([3.0], False),
        ([0.0], False),
        ([-2.0, 5e6], False),
        ([1e-5, 1e-2], True),
        ([2.0, 3.0], True),
    ],
)
def test_axes_hold_their_values_and_have_a_few_ticks(values: list[float], log: bool) -> None:
    axis = Axis.over(values, log)
    assert all(0 <= axis.at(value) <= 1 for value in values)
    assert all(-1e-9 <= axis.at(tick) <= 1 + 1e-9 for tick in axis.ticks)
    assert 2 <= len(axis.ticks) <= 8


def test_axis_without_values_is_still_one() -> None:
    assert Axis.over([float("nan")]).ticks


def test_labels_move_apart_in_their_order() -> None:
    moved = spread_out([10.0, 12.0, 11.0, 60.0], 16)
    assert [moved[i] for i in (0, 2, 1, 3)] == sorted(moved)
    assert min(np.diff(sorted(moved))) >= 16


def test_loads_are_means_over_tasks_and_seeds() -> None:
    _, made = planted_study()
    routings = [history(one).routing for one in made[-2:]]
    assert all(routing is not None for routing in routings)
    first = routings[0]
    by_hand = np.mean(
        [first["datasets"]["made-up"][task]["dependent"]["load"]["hubert"] for task in ("asr", "er", "aqa")]
    )
    assert mean_load(first, "dependent")["hubert"] == pytest.approx(by_hand)
    er = np.mean([routing["datasets"]["made-up"]["er"]["dependent"]["load"]["hubert"] for routing in routings])
    assert f">{100 * er:.0f} %</td>" in heat_map(routings)
    assert heat_map([]) == ""


def test_a_task_of_several_datasets_is_told_by_both_names() -> None:
    even = {"dependent": {"load": {"a": 0.25, "b": 0.75}}, "independent": {"load": {"a": 0.0, "b": 1.0}}}
    other = {"dependent": {"load": {"a": 1.0, "b": 0.0}}, "independent": {"load": {"a": 0.0, "b": 1.0}}}
    routing = {"members": ["a", "b"], "datasets": {"clean": {"asr": even, "er": even}, "noisy": {"asr": other}}}
    assert mean_load(routing, "dependent") == pytest.approx({"a": 0.5, "b": 0.5})
    assert [text for text in Page(heat_map([routing])).texts if "asr" in text or "er" in text] == [
        "clean/asr", "er", "noisy/asr"
    ]  # fmt: skip
    nowhere = {"members": ["a"], "datasets": {}}
    assert heat_map([nowhere]) == ""


def test_a_line_goes_through_the_values_of_its_point() -> None:
    config, made = planted_study()
    measured = points(config, made)
    html = parallel_coordinates(config, measured, Colouring())
    lines = [a for element, a in Page(html).elements if element == "path"]
    assert len(lines) == sum(point.mean is not None for point in measured)
    assert sum(a["class"] == "way winner" for a in lines) == 1
    objectives = {str(a["data-tip"]): float(str(a["d"]).rsplit(" ", 1)[1]) for a in lines}
    by_label = {point_label(p.values): p.mean for p in measured if p.mean is not None}
    scored = sorted((by_label[tip.partition("\n")[0]], -down) for tip, down in objectives.items())
    assert [down for _, down in scored] == sorted(down for _, down in scored)
    one_entry, few = top_k_study()
    assert parallel_coordinates(one_entry, points(one_entry, few), Colouring()) == ""


def test_study_without_pools_has_no_routing() -> None:
    config, made = top_k_study()
    assert "What the routers chose" not in Page(report(config, made, histories(made), None)).headings()
