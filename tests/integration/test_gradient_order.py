"""Gradients are summed right where ranks use their parameters in another order, or not all of them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mowe_ray.distributed.engine import deepspeed
from mowe_ray.distributed.engine.gradients import GradientOrder
from tests.ranks import run_ranks

SIZE = 7
MICRO_BATCHES = 3
WORLD_SIZE = 2
STAGES = (2, 3)


class Branches(nn.Module):
    """Four vectors of one size whose gradients become ready in an order that the input decides."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("first", "second", "third", "rare"):
            setattr(self, name, nn.Parameter(torch.randn(SIZE, generator=generator)))

    def forward(self, x: torch.Tensor, order: list[str]) -> torch.Tensor:
        """Compute with the vectors in `order`; gradients arrive in the reverse."""
        for name in order:
            x = torch.tanh(x + getattr(self, name))
        return x.square().sum()


def _inputs(rank: int, number: int) -> tuple[torch.Tensor, list[str]]:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(10 * rank + number))
    orders = (["first", "second", "third"], ["second", "third", "first"], ["third", "first", "second"])
    order = orders[(2 * rank + number) % 3]
    return x, [*order, "rare"] if (rank, number) == (1, 1) else order


def _gradients(stage: int, bucket: int) -> list[dict[str, torch.Tensor]]:
    """Return the gradients of two steps; in the second one `rare` is used by nobody."""
    model = Branches()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        config=settings,
    )
    GradientOrder(engine.optimizer, model.parameters())
    steps = []
    for numbers in (range(MICRO_BATCHES), [0]):
        for number in numbers:
            engine.set_gradient_accumulation_boundary(number == numbers[-1])
            x, order = _inputs(dist.get_rank(), number)
            engine.backward(engine(x, order) * WORLD_SIZE, scale_wrt_gas=False)
        named = model.named_parameters()
        steps.append({name: deepspeed.utils.safe_get_full_grad(p).clone() for name, p in named})
        engine.step()
    return steps


def _all_gradients() -> dict[tuple[int, int], list[dict[str, torch.Tensor]]]:
    return {(stage, bucket): _gradients(stage, bucket) for stage in STAGES for bucket in (SIZE, 3 * SIZE, 100 * SIZE)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[int, int], list[dict[str, torch.Tensor]]]]:
    return run_ranks(_all_gradients, folder=tmp_path_factory.mktemp("ranks"), ranks=WORLD_SIZE)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bucket", [SIZE, 3 * SIZE, 100 * SIZE])
def test_every_gradient_is_the_sum_over_ranks(ranks: list[Any], stage: int, bucket: int) -> None:
    for step, numbers in enumerate((range(MICRO_BATCHES), [0])):
        model = Branches()
        sum(model(*_inputs(rank, number)) for rank in range(WORLD_SIZE) for number in numbers).backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros(SIZE) if parameter.grad is None else parameter.grad
            for rank in ranks:
                torch.testing.assert_close(rank[stage, bucket][step][name], expected, msg=f"step {step}: {name}")
