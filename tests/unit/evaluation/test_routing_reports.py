"""From routing records to sums, reports and pictures."""

import io
import json
import math

import pytest
import torch
from matplotlib import image

from mowe_ray.evaluation.router_report import draw, router_report
from mowe_ray.evaluation.routing_sums import RoutingSums
from mowe_ray.model import Routing, RoutingRecord

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


def test_the_report_is_json_and_its_picture_a_png(record):
    sums = RoutingSums.of(record)
    history = [{"kind": "train", "step": step, "routing": sums.summary(MEMBERS)} for step in (10, 20)]
    report = json.loads(json.dumps(router_report(MEMBERS, {"asr": sums, "er": sums}, history)))
    assert report["members"] == MEMBERS
    assert report["entropy_of_uniform_nats"] == pytest.approx(nats(1 / 3, 1 / 3, 1 / 3))
    assert list(report["validation"]) == ["asr", "er"]
    assert [entry["step"] for entry in report["training"]] == [10, 20]
    pixels = image.imread(io.BytesIO(draw(report)), format="png")
    assert pixels.shape[0] > 300
    assert pixels[..., :3].std() > 0.05, "not an empty picture"


def test_a_report_without_training_history_can_be_drawn(record):
    report = router_report(MEMBERS, {"asr": RoutingSums.of(record)}, [])
    assert draw(report).startswith(b"\x89PNG")
