"""From routing records and answers to sums, reports, alarms and pictures."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib import image

from mowe_ray.evaluation.predictions import Answer, RouterChoice
from mowe_ray.evaluation.routing import RoutingSums, draw, router_report, routing_of
from mowe_ray.model import Routing, RoutingRecord
from mowe_ray.model.routing import route
from mowe_ray.output.charts import PALETTE
from tests.made_evaluation import BUILTIN, MANY, SHARES, TASKS, ablations, answers, choice, routed
from tests.made_evaluation import MEMBERS as POOL

MEMBERS = ["a", "b", "c"]


def routing(*rows: list[float]) -> Routing:
    probabilities = torch.tensor(rows if len(rows) > 1 else rows[0])
    chosen = torch.nn.functional.one_hot(probabilities.argmax(-1), 3).bool()
    return Routing(probabilities.log(), probabilities, chosen)


@pytest.fixture
def record() -> RoutingRecord:
    return RoutingRecord(routing([0.2, 0.3, 0.5]), routing([0.6, 0.3, 0.1], [0.1, 0.8, 0.1]), 2)


def nats(*probabilities: float) -> float:
    return -sum(p * math.log(p) for p in probabilities)


def test_sums_tell_loads_probabilities_and_entropies(record):
    summary = RoutingSums.of(record).summary(MEMBERS)
    assert summary["dependent"]["load"] == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert summary["dependent"]["probability"] == pytest.approx({"a": 0.35, "b": 0.55, "c": 0.1})
    assert summary["dependent"]["entropy"] == pytest.approx((nats(0.6, 0.3, 0.1) + nats(0.1, 0.8, 0.1)) / 2)
    assert summary["independent"]["load"] == {"a": 0.0, "b": 0.0, "c": 1.0}
    assert summary["independent"]["probability"] == pytest.approx({"a": 0.2, "b": 0.3, "c": 0.5})
    assert summary["independent"]["entropy"] == pytest.approx(nats(0.2, 0.3, 0.5))


def test_mutual_information_of_clip_and_encoder(record):
    told = RoutingSums.of(record).summary(MEMBERS)["dependent"]
    assert told["mutual_information"] == pytest.approx(nats(0.35, 0.55, 0.1) - told["entropy"])
    alike = RoutingRecord(None, routing([0.6, 0.3, 0.1], [0.6, 0.3, 0.1]), 2)
    assert RoutingSums.of(alike).summary(MEMBERS)["dependent"]["mutual_information"] == pytest.approx(0, abs=1e-6)


def test_a_clip_whose_frames_choose_counts_by_their_share():
    frames = torch.tensor([[[0.7, 0.3], [0.2, 0.8], [0.9, 0.1]], [[0.4, 0.6], [0.0, 1.0], [0.0, 1.0]]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    per_frame = route(frames.log(), k=1, temperature=1.0, noise=None, valid=valid)
    summary = RoutingSums.of(RoutingRecord(None, per_frame, 2)).summary(["a", "b"])["dependent"]
    assert summary["load"] == pytest.approx({"a": 2 / 6, "b": 1 / 6 + 1 / 2})
    assert summary["probability"] == pytest.approx({"a": (0.6 + 0.4) / 2, "b": (0.4 + 0.6) / 2})
    entropies = [(nats(0.7, 0.3) + nats(0.2, 0.8) + nats(0.9, 0.1)) / 3, nats(0.4, 0.6)]
    assert summary["entropy"] == pytest.approx(sum(entropies) / 2)


def test_sums_add_and_reduce_over_ranks(record):
    one = RoutingSums.of(record)
    two = RoutingSums.of(record, one)
    assert float(two.clips) == 4
    for router, told in one.summary(MEMBERS).items():
        assert two.summary(MEMBERS)[router]["load"] == pytest.approx(told["load"])
        assert two.summary(MEMBERS)[router]["entropy"] == pytest.approx(told["entropy"])
    reduced = one.reduced(lambda values: values * 2)
    for name, value in vars(two).items():
        assert torch.equal(getattr(reduced, name), value), name


def test_a_router_that_is_off_sums_to_zero(record):
    sums = RoutingSums.of(RoutingRecord(None, record.dependent, 2))
    assert sums.independent_chosen.tolist() == [0, 0, 0]
    assert sums.summary(MEMBERS)["dependent"]["load"]["a"] == 0.5
    assert RoutingSums.of(None) is None
    assert RoutingSums.of(RoutingRecord(None, None, 2)) is None


def spoken(name: str, dependent: RouterChoice | None, independent: RouterChoice | None, task: str = "asr") -> Answer:
    return Answer(name, task, "What?", "x", ["x"], 1.0, independent, dependent)


def test_answers_sum_to_what_the_records_of_their_batches_do(record):
    one = RouterChoice([0.0, 0.0, 1.0], [0.2, 0.3, 0.5])
    found = routing_of(
        [
            spoken("0", RouterChoice([1.0, 0.0, 0.0], [0.6, 0.3, 0.1]), one),
            spoken("1", RouterChoice([0.0, 1.0, 0.0], [0.1, 0.8, 0.1]), one),
            spoken("text", None, None),
            spoken("other", RouterChoice([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]), one, task="er"),
        ]
    )
    assert list(found) == ["asr", "er"]
    for name, value in vars(RoutingSums.of(record)).items():
        torch.testing.assert_close(getattr(found["asr"], name), value, check_dtype=False)
    assert found["er"].summary(MEMBERS)["dependent"]["entropy"] == pytest.approx(0.0, abs=1e-12)
    assert routing_of([spoken("text", None, None)]) == {}


def test_clips_heard_in_pieces_and_routers_that_are_off_count():
    pieces = RouterChoice([0.25, 0.75, 0.0], [0.3, 0.6, 0.1])
    (sums,) = routing_of(
        [spoken("0", pieces, None), spoken("1", RouterChoice([0.0, 0.0, 1.0], [0, 0, 1.0]), None)]
    ).values()
    summary = sums.summary(MEMBERS)
    assert summary["dependent"]["load"] == {"a": 0.125, "b": 0.375, "c": 0.5}
    assert summary["dependent"]["entropy"] == pytest.approx(nats(0.3, 0.6, 0.1) / 2)
    assert summary["independent"]["load"] == dict.fromkeys(MEMBERS, 0.0)
    assert summary["independent"]["entropy"] == 0.0


def test_loads_in_the_report_are_a_count_over_the_answers():
    made = {name: [one for task in tasks for one in answers(task, SHARES[task])] for name, tasks in MANY.items()}
    report = json.loads(json.dumps(router_report(POOL, {name: routing_of(a) for name, a in made.items()}, [])))
    assert report["members"] == list(POOL)
    assert report["entropy_of_uniform_nats"] == pytest.approx(nats(1 / 3, 1 / 3, 1 / 3))
    assert {name: list(tasks) for name, tasks in report["datasets"].items()} == {n: list(t) for n, t in MANY.items()}
    for name, tasks in report["datasets"].items():
        for task, summary in tasks.items():
            heard = [answer for answer in made[name] if answer.task == task]
            assert summary["clips"] == len(heard)
            for i, member in enumerate(POOL):
                count = sum(1 for answer in heard if answer.dependent.load[i] == 1)
                assert summary["dependent"]["load"][member] == count / len(heard)
            both = sum(1 for answer in heard if answer.dependent.load == answer.independent.load)
            assert summary["overlap"] == pytest.approx(both / len(heard), abs=1e-12)
    assert report["alarms"] == []
    assert "ablation" not in report


def top_2(*chosen: str) -> RouterChoice:
    return RouterChoice([float(member in chosen) for member in MEMBERS], [1 / 3] * 3)


def test_overlap_of_top_2_is_the_mean_share_of_common_members():
    always = top_2("a", "b")
    found = routing_of([spoken("0", top_2("a", "b"), always), spoken("1", top_2("b", "c"), always)])
    assert router_report(MEMBERS, {"d": found}, [])["datasets"]["d"]["asr"]["overlap"] == pytest.approx((1 + 0.5) / 2)
    off = routing_of([spoken("0", top_2("a", "b"), None)])
    assert router_report(MEMBERS, {"d": off}, [])["datasets"]["d"]["asr"]["overlap"] is None


def test_a_router_set_by_hand_shows_exactly_its_choices_and_no_alarm():
    by_hand = {task: {POOL[i % 3]: 1.0} for i, task in enumerate(TASKS)}
    report = routed(BUILTIN, by_hand)
    for task, summary in report["datasets"]["builtin"].items():
        assert {m: load for m, load in summary["dependent"]["load"].items() if load} == by_hand[task]
    assert report["alarms"] == []


def test_a_collapsed_router_and_idle_members_raise_alarms():
    assert routed(BUILTIN, {task: {"whisper": 1.0} for task in TASKS})["alarms"] == [
        "The data-dependent router has collapsed: 100 % of its choices over 5 tasks (200 clips) are whisper.",
        "Never chosen by either router over 5 tasks (200 clips): hubert-er.",
    ]
    (idle,) = routed(BUILTIN, {task: {"whisper": 0.5, "hubert": 0.5} for task in TASKS})["alarms"]
    assert idle == "Never chosen by either router over 5 tasks (200 clips): hubert-er."
    by_other = routed(BUILTIN, {task: {"whisper": 0.5, "hubert": 0.5} for task in TASKS}, always="hubert-er")
    assert by_other["alarms"] == [], "the other router uses it"


@pytest.mark.parametrize(("share", "fires"), [(0.94, False), (0.95, False), (0.96, True)])
def test_collapse_begins_above_95_percent(share, fires):
    shares = {task: {"whisper": share, "hubert-er": 1 - share} for task in TASKS}
    report = routed(BUILTIN, shares, clips=100)
    assert any("collapsed" in alarm for alarm in report["alarms"]) is fires


def test_a_task_with_many_clips_or_datasets_is_no_collapse():
    def sums(task: str, member: str, clips: int) -> dict[str, RoutingSums]:
        return routing_of(answers(task, {member: 1.0}, clips=clips, always="hubert"))

    datasets = {f"asr-{i}": sums("asr", "whisper", 500) for i in range(30)} | {"er": sums("er", "hubert-er", 5)}
    assert router_report(POOL, datasets, [])["alarms"] == []


def test_two_favourites_of_top_2_are_a_collapse_and_a_full_choice_is_none():
    always = top_2("a", "c")
    collapsed = routing_of([spoken(str(i), top_2("a", "b"), always) for i in range(30)])
    (alarm,) = router_report(MEMBERS, {"d": collapsed}, [])["alarms"]
    assert alarm == "The data-dependent router has collapsed: 100 % of its choices over 1 task (30 clips) are a and b."
    everything = routing_of([spoken(str(i), top_2("a", "b", "c"), top_2("a", "b", "c")) for i in range(30)])
    assert router_report(MEMBERS, {"d": everything}, [])["alarms"] == []


def test_a_pool_of_one_has_no_choice_to_get_wrong():
    alone = routing_of([spoken("0", choice("a", ["a"], 1.0), choice("a", ["a"], 1.0))])
    report = router_report(["a"], {"d": alone}, [])
    assert report["alarms"] == []
    assert draw(report).startswith(b"\x89PNG")
    assert draw(report, "pdf").startswith(b"%PDF")
    svg = draw(report, "svg").decode()
    assert "<text" in svg
    assert PALETTE[0] in svg


def test_the_report_is_json_and_its_picture_a_png(record):
    sums = RoutingSums.of(record)
    history = [{"kind": "train", "step": step, "routing": sums.summary(MEMBERS)} for step in (10, 20)]
    made = router_report(MEMBERS, {"d": {"er": sums, "asr": sums}, "without": {}}, history, ablations(BUILTIN))
    report = json.loads(json.dumps(made))
    assert report == made
    assert {dataset: list(tasks) for dataset, tasks in report["datasets"].items()} == {"d": ["asr", "er"]}
    assert report["datasets"]["d"]["asr"]["clips"] == 2
    assert [entry["step"] for entry in report["training"]] == [10, 20]
    assert report["ablation"][0]["change"].keys() == {"value", "low", "high"}
    pixels = image.imread(io.BytesIO(draw(report)), format="png")
    assert pixels.shape[0] > 300
    assert pixels[..., :3].std() > 0.05, "not an empty picture"


def size(report) -> tuple[int, int]:
    return image.imread(io.BytesIO(draw(report)), format="png").shape[:2]


@pytest.mark.slow
def test_the_picture_grows_with_its_rows_and_shrinks_without_a_history():
    builtin, many = routed(BUILTIN), routed(MANY)
    assert size(many)[0] > size(builtin)[0]
    assert size({**builtin, "training": []})[1] < size(builtin)[1]
    assert size({**builtin, "alarms": ["Something is wrong." * 10]})[0] > size(builtin)[0]


def test_names_with_signs_of_formulas_are_drawn_as_they_are():
    members = ["$x^$", "_hidden", "b\\frac"]
    heard = [replace(one, task="$\\bad$") for one in answers("asr", {"$x^$": 1.0}, members=members, always="_hidden")]
    report = router_report(members, {"$d": routing_of(heard), "e_": routing_of(heard)}, [])
    assert len(report["alarms"]) == 2
    assert draw(report).startswith(b"\x89PNG")
