import math

import pytest
import torch

from mowe_ray.model.building import parameter_parts
from mowe_ray.training.optimizer import decays, learning_rate_factor, parameter_groups, set_learning_rates


@pytest.mark.parametrize(
    ("schedule", "decayed"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1.0 - done),
        ("cosine", lambda done: math.cos(math.pi / 2 * done) ** 2),
    ],
)
def test_schedules_equal_their_closed_forms(schedule, decayed):
    total, warmup = 50, 10
    for step in range(total):
        factor = learning_rate_factor(step, warmup, max(0, step - warmup) / (total - warmup), schedule)
        expected = (step + 1) / warmup if step < warmup else decayed((step - warmup) / (total - warmup))
        assert factor == pytest.approx(expected, abs=1e-12)
        assert 0 < factor <= 1


def test_no_warmup_starts_at_the_peak_and_all_warmup_never_decays():
    assert learning_rate_factor(0, 0, 0.0, "cosine") == 1.0
    assert learning_rate_factor(0, 0, 0.0, "linear") == 1.0
    assert [learning_rate_factor(s, 8, 0.0, "linear") for s in range(4)] == [0.125, 0.25, 0.375, 0.5]
    assert learning_rate_factor(5, 0, 1.5, "cosine") == 0.0, "a run that is longer than it was ends at 0"


def test_groups_hold_every_trainable_tensor_once(make_model):
    model = make_model()
    rates = {"routers": 0.5, "adapter": None, "weak_encoders": 0.0}
    groups = parameter_groups(model, parameter_parts(model), 0.1, rates, 0.01)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(trainable)
    parts = parameter_parts(model)
    for group in groups:
        assert group["peak_lr"] == {"routers": 0.5, "weak_encoders": 0.0}.get(group["part"], 0.1)
        for parameter in group["params"]:
            assert parts[trainable[id(parameter)]] == group["part"]
            assert group["weight_decay"] == (0.01 if decays(trainable[id(parameter)], parameter.ndim) else 0.0)
    assert not {group["part"] for group in groups} & {"base_encoder"}, "the base is frozen"


def test_factors_scale_each_groups_own_peak():
    tensors = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "lr": 0.0, "peak_lr": peak} for p, peak in zip(tensors, (1.0, 0.2), strict=True)]
    set_learning_rates(groups, 0.5)
    set_learning_rates(groups, 0.25)
    assert [group["lr"] for group in groups] == [0.25, 0.05]
