from collections.abc import Callable

import numpy as np
import pytest
import torch

from mowe_ray.model.routing import Routing, RoutingRecord, route
from mowe_ray.model.routing_loss import ROUTING_LOSSES, RoutingTotals, routing_loss

K, TEMPERATURE = 2, 1.7


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(-1)


def entropy_diversity(q: np.ndarray, p: np.ndarray) -> float:
    return float(entropy(q) + entropy(p).mean() - entropy(p.mean(0)))


def load_balance(q: np.ndarray, p: np.ndarray) -> float:
    members = p.shape[1]
    counts = np.zeros(members)
    for row in p:
        for member in np.argsort(-row)[:K]:
            counts[member] += 1
    return float(members * (counts / counts.sum() * p.mean(0)).sum())


def importance_cv2(q: np.ndarray, p: np.ndarray) -> float:
    importance = p.sum(0)
    return float((importance.std() / importance.mean()) ** 2)


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "entropy_diversity": entropy_diversity,
    "load_balance": load_balance,
    "importance_cv2": importance_cv2,
    "none": lambda q, p: 0.0,
}


def reference(kind: str, v: np.ndarray, w: np.ndarray, z_weight: float) -> float:
    """The loss of logits v (M,) and w (N, M) in plain float64."""
    z = np.log(np.exp(v).sum()) ** 2 + (np.log(np.exp(w).sum(1)) ** 2).mean()
    return FORMULAS[kind](softmax(v / TEMPERATURE), softmax(w / TEMPERATURE)) + z_weight * float(z)


def logits(clips: int = 7, members: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    v = torch.randn(members, generator=random, dtype=torch.float64, requires_grad=True)
    w = torch.randn(clips, members, generator=random, dtype=torch.float64, requires_grad=True)
    return v, w


def decide(values: torch.Tensor) -> Routing:
    return route(values, k=K, temperature=TEMPERATURE, noise=None)


def record_of(v: torch.Tensor | None, w: torch.Tensor | None, clips: int) -> RoutingRecord:
    return RoutingRecord(None if v is None else decide(v), None if w is None else decide(w), clips)


@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("kind", ROUTING_LOSSES)
def test_value_and_gradient_are_the_formulas(kind: str, z_weight: float) -> None:
    v, w = logits()
    loss = routing_loss(record_of(v, w, len(w)), kind=kind, z_weight=z_weight).total
    loss.backward()
    v_, w_ = v.detach().numpy().copy(), w.detach().numpy().copy()
    assert loss.item() == pytest.approx(reference(kind, v_, w_, z_weight), abs=1e-12)
    for array, grad in ((v_, v.grad), (w_, w.grad)):
        assert grad is not None
        for index in np.ndindex(array.shape):
            kept, step = array[index], 1e-6
            array[index] = kept + step
            above = reference(kind, v_, w_, z_weight)
            array[index] = kept - step
            below = reference(kind, v_, w_, z_weight)
            array[index] = kept
            assert float(grad[index]) == pytest.approx((above - below) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in ROUTING_LOSSES if kind != "none"])
def test_gradient_is_not_zero(kind: str) -> None:
    v, w = logits()
    routing_loss(record_of(v, w, len(w)), kind=kind).total.backward()
    assert w.grad is not None
    assert w.grad.abs().max() > 1e-3


@pytest.mark.parametrize("split", [[7], [3, 4], [1, 0, 5, 1], [0, 7]])
@pytest.mark.parametrize("kind", ROUTING_LOSSES)
def test_micro_batches_add_up_to_the_whole_batch(kind: str, split: list[int]) -> None:
    v, w = logits()
    whole = routing_loss(record_of(v, w, len(w)), kind=kind, z_weight=0.2).total
    wanted = torch.autograd.grad(whole, [v, w])
    parts = list(w.split(split))
    totals = RoutingTotals.of(decide(parts[0]))
    for part in parts[1:]:
        totals = totals + RoutingTotals.of(decide(part))
    shares = [
        routing_loss(record_of(v, part, len(part)), kind=kind, z_weight=0.2, totals=totals).total for part in parts
    ]
    # Each on its own, as ranks do it: none sees another's graph.
    grads = [torch.autograd.grad(share, [v, w], retain_graph=True) for share in shares]
    assert sum(shares).item() == pytest.approx(whole.item(), abs=1e-12)
    for index in range(2):
        total = torch.stack([grad[index] for grad in grads]).sum(0)
        assert (total - wanted[index]).abs().max() < 1e-10


def test_data_independent_router_alone_counts_once() -> None:
    v, _ = logits()
    whole = routing_loss(record_of(v, None, 7), kind="entropy_diversity", z_weight=0.2).total
    nothing = torch.zeros(4, dtype=torch.float64)
    totals = RoutingTotals(nothing, nothing, torch.tensor(7.0, dtype=torch.float64))
    shares = [
        routing_loss(record_of(v, None, clips), kind="entropy_diversity", z_weight=0.2, totals=totals).total
        for clips in (2, 0, 5)
    ]
    assert sum(shares).item() == pytest.approx(whole.item(), abs=1e-12)


def test_batch_without_clips_has_zero_loss_and_zero_gradient() -> None:
    v, w = logits(clips=0)
    loss = routing_loss(record_of(v, w, 0), kind="entropy_diversity", z_weight=1.0).total
    loss.backward()
    assert float(loss) == 0
    assert v.grad is not None
    assert (v.grad == 0).all()


def test_saturated_router_has_a_finite_gradient() -> None:
    w = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    routing_loss(record_of(None, w, 1), kind="entropy_diversity").total.backward()
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()


def test_no_routers_no_loss() -> None:
    assert float(routing_loss(RoutingRecord(None, None, 3), kind="load_balance").total) == 0


@pytest.mark.parametrize("kind", ["load_balance", "importance_cv2"])
def test_balance_without_the_dependent_router_is_refused(kind: str) -> None:
    v, _ = logits()
    with pytest.raises(ValueError, match=r"model\.router\.data_dependent"):
        routing_loss(record_of(v, None, 3), kind=kind)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.mowe_loss\.kind.*entropy_diversity"):
        routing_loss(RoutingRecord(None, None, 3), kind="diversity")


def test_totals_survive_the_trip_through_one_vector() -> None:
    totals = RoutingTotals.of(decide(logits()[1]))
    back = RoutingTotals.from_vector(totals.to_vector())
    assert torch.equal(back.probability_sum, totals.probability_sum)
    assert torch.equal(back.dispatch_sum, totals.dispatch_sum)
    assert float(back.clips) == 7


def test_parts_have_their_own_weights() -> None:
    v, w = logits()
    record = record_of(v, w, len(w))
    p, q = (w / TEMPERATURE).softmax(-1), (v / TEMPERATURE).softmax(-1)
    wanted = {
        "confidence": -(p * p.log()).sum(-1).mean(),
        "diversity": (p.mean(0) * p.mean(0).log()).sum(),
        "commitment": -(q * q.log()).sum(),
    }
    total, parts = routing_loss(record, kind="entropy_diversity", weights={"diversity": 0.5, "commitment": 0.0})
    assert parts.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(parts[name]) == pytest.approx(float(value), abs=1e-12)
    assert total.item() == pytest.approx(float(wanted["confidence"] + 0.5 * wanted["diversity"]), abs=1e-12)


def test_decisions_for_each_frame_count_as_so_many_clips() -> None:
    generator = torch.Generator().manual_seed(3)
    frames = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    valid = torch.arange(5) < torch.tensor([5, 2])[:, None]
    for kind in ROUTING_LOSSES:
        per_frame = route(frames, k=K, temperature=TEMPERATURE, noise=None, valid=valid)
        flat = decide(frames[valid])
        found = routing_loss(RoutingRecord(None, per_frame, 2), kind=kind, z_weight=0.3).total
        assert float(found) == pytest.approx(
            float(routing_loss(RoutingRecord(None, flat, 7), kind=kind, z_weight=0.3).total)
        )


def test_members_that_are_absent_do_not_change_what_routers_are_regulated_to() -> None:
    v, w = logits()
    absent = torch.rand(len(w), 4, generator=torch.Generator().manual_seed(0)) < 0.5
    partial = RoutingRecord(
        *(route(x, k=K, temperature=TEMPERATURE, noise=None, absent=absent) for x in (v, w)), clips=len(w)
    )
    for kind in ("entropy_diversity", "importance_cv2"):
        found, wanted = (routing_loss(r, kind=kind).total for r in (partial, record_of(v, w, len(w))))
        assert float(found) == float(wanted)
