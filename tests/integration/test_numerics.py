"""A step whose loss or gradient is not finite on one rank leaves no trace on any, under every ZeRO stage.

The causes are real: a clip that is not finite on one rank only, and a gradient that overflows. The reference is the
same run without those steps; what it has to equal, it has to equal bit for bit.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.training.collate import collate
from mowe_ray.training.loop import StepResult
from tests.ranks import Row, make_engine, make_model, micro_batch, run_ranks, steer_routers, train

pytestmark = pytest.mark.slow

# Members of the pool change between steps, so that gradients left over from a skipped one would show.
PLAN: list[list[list[Row]]] = [
    [[0], [1], [2], [0, 1]],
    [[1], [2], [3], [4]],
    [[0, 2], [1], [], [3]],
    [[4], [0, 3], [2], [1]],
    [[1], [3], [0], [None]],
]
# Step -> (lane, factor on the samples): the lane's rank alone sees numbers that are not finite. 0 * inf is NaN.
BAD = {1: (3, math.inf), 2: (0, math.nan)}
GOOD_STEPS = [step for step in range(len(PLAN)) if step not in BAD]

Numerics = tuple[int, bool, Literal["none", "cpu"]]
# Each stage, each precision and offloading once; `make soak` has the other pairs.
RUNS: list[Numerics] = [
    (0, False, "none"),
    (1, False, "none"),
    (2, True, "none"),
    (3, False, "none"),
    (2, False, "cpu"),
]
MORE_RUNS: list[Numerics] = [(2, False, "none"), (0, True, "none"), (3, True, "none"), (3, False, "cpu")]
Run = dict[str, Any]


def _batches() -> list[list[MicroBatch]]:
    steps = [
        [micro_batch(rows, seed=100 * step + 10 * lane) for lane, rows in enumerate(lanes)]
        for step, lanes in enumerate(PLAN)
    ]
    for step, (lane, factor) in BAD.items():
        batch = steps[step][lane]
        steps[step][lane] = replace(batch, scales=[factor if length else 1.0 for length in batch.lengths])
    return steps


def _engine(numerics: Numerics) -> Any:
    stage, bf16, offload = numerics
    model, processor = make_model(dtype=torch.bfloat16 if bf16 else torch.float32)
    steer_routers(model, processor)
    return make_engine(model, stage, bf16=bf16, offload=offload), processor


def _run(numerics: Numerics, steps: list[int], *, overflow: bool = False) -> Run:
    """Train on some steps of the plan, each with its own number and so its own learning rate and seeds.

    Args:
        overflow: Before the last step, put in one whose loss is finite while its gradient is not.
    """
    engine, processor = _engine(numerics)
    batches = _batches()
    results: list[StepResult] = []
    weights: list[dict[str, torch.Tensor]] = []
    run: Run = {"results": results, "weights": weights}
    for step in steps:
        if overflow and step == steps[-1]:
            run["overflow"] = _overflow(engine, processor)
            run["after_overflow"] = engine.full_state_dict()
        (result,) = train(engine, processor, batches[: step + 1], start_step=step)
        results.append(replace(result, batches=[], routing=None))
        weights.append(engine.full_state_dict())
    return run


def _overflow(engine: Any, processor: Any) -> tuple[float, float]:
    """Accumulate an infinite gradient and a normal one, and step; returns the loss of the first and the norm."""
    inputs = collate(micro_batch([0, 1, 2, 3]), processor).inputs
    loss = engine.forward(**inputs).loss
    infinite_slope = (loss - loss.detach()).sqrt()  # sqrt(0) is 0, its derivative is not
    engine.backward(infinite_slope, last=False)
    engine.backward(engine.forward(**inputs).loss, last=True)
    return float(infinite_slope.detach()), engine.step(1.0)


def _work(kinds: list[Numerics]) -> dict[Numerics, dict[str, Run]]:
    everything = list(range(len(PLAN)))
    return {
        numerics: {"bad": _run(numerics, everything, overflow=True), "good": _run(numerics, GOOD_STEPS)}
        for numerics in kinds
    }


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Numerics, dict[str, Run]]]:
    return run_ranks(_work, RUNS, folder=tmp_path_factory.mktemp("numerics"))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Numerics, dict[str, Run]]]:
    return run_ranks(_work, MORE_RUNS, folder=tmp_path_factory.mktemp("numerics"))


@pytest.fixture(
    params=[*RUNS, *(pytest.param(run, marks=pytest.mark.soak) for run in MORE_RUNS)],
    ids=lambda run: f"zero{run[0]}{'-bf16' if run[1] else ''}-{run[2]}",
)
def runs(request: pytest.FixtureRequest) -> list[dict[str, Run]]:
    """What the two ranks returned, in one kind of numerics."""
    ranks = request.getfixturevalue("some" if request.param in RUNS else "more")
    return [rank[request.param] for rank in ranks]


def assert_equal_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []


def test_bad_steps_are_skipped_on_both_ranks_and_no_others(runs: list[dict[str, Run]]) -> None:
    for rank in runs:
        results = rank["bad"]["results"]
        assert [step for step, result in enumerate(results) if result.skipped] == list(BAD)
        assert [step for step, result in enumerate(results) if not math.isfinite(result.grad_norm)] == list(BAD)
        assert [step for step, result in enumerate(results) if not math.isfinite(result.loss)] == list(BAD)


def test_a_skipped_step_changes_no_weight(runs: list[dict[str, Run]]) -> None:
    weights = runs[0]["bad"]["weights"]
    for step in BAD:
        assert_equal_weights(weights[step], weights[step - 1])


def test_training_goes_on_as_if_the_step_had_not_been(runs: list[dict[str, Run]]) -> None:
    bad, good = runs[0]["bad"], runs[0]["good"]
    assert [bad["results"][step].loss for step in GOOD_STEPS] == [result.loss for result in good["results"]]
    assert [bad["results"][step].grad_norm for step in GOOD_STEPS] == [result.grad_norm for result in good["results"]]
    for step, expected in zip(GOOD_STEPS, good["weights"], strict=True):
        assert_equal_weights(bad["weights"][step], expected)
    assert any(not torch.equal(weight, good["weights"][0][name]) for name, weight in good["weights"][-1].items())


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(runs: list[dict[str, Run]]) -> None:
    for rank in runs:
        loss, norm = rank["bad"]["overflow"]
        assert loss == 0.0
        assert norm == math.inf
    assert_equal_weights(runs[0]["bad"]["after_overflow"], runs[0]["bad"]["weights"][-2])
