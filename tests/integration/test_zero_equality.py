"""Two and three ranks under every ZeRO stage end with the weights of one process that does the whole thing at once.

The reference knows nothing of ranks, sparse dispatch or DeepSpeed: it puts the global batch through the
model in a single forward that runs every encoder on every clip, and updates with torch's AdamW.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.training.collate import collate
from mowe_ray.training.validation import ValidationResult, validate
from tests.ranks import (
    CLIP_NORM,
    WARMUP_STEPS,
    Row,
    curve,
    dealt,
    make_engine,
    make_model,
    merged,
    micro_batch,
    plain_engine,
    run_ranks,
    steer_routers,
    train,
    weights_of,
)

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
WORLD_SIZES = (2, pytest.param(3, marks=pytest.mark.soak))

# Per step the rows of the micro-batches of ranks 0, 1, 0, 1; or of ranks 0, 1, 2, 0, where ranks 1 and 2 get an empty
# one besides. A number is the kind of clip, which is also the pool member it chooses; members 1 and 2 have equal
# shapes, 3 is chosen by all clips besides.
PLAN: list[list[list[Row]]] = [
    [[0, 0], [1], [0], [1, 1]],  # the ranks choose different members; 2 and 4 are chosen by nobody
    [[1], [0, 2], [1, 1], [0]],  # and swap them
    [[1, 1], [2, 2], [1], [2]],  # equal shapes: an exchange of gradients between them would go unnoticed
    [[None, None], [2], [None], [4]],  # a rank with text alone: 0 of two, 2 of three
    [[], [None], [0, None, 0], [1, None]],  # micro-batches that lost all their samples, or have no audio
    [[None], [], [None, None], []],  # no audio in the whole step, and nothing at all on a rank
    [[4], [4, 4], [4], [4]],  # only the frozen member, everywhere
    [[0, 1], [2, 3], [4, 0], [1, 2, 3]],
]
BATCHES = [
    [micro_batch(rows, seed=100 * step + 10 * lane) for lane, rows in enumerate(lanes)]
    for step, lanes in enumerate(PLAN)
]
VALIDATION_ROWS: list[list[Row]] = [[0, 1], [2, None, 4], [3], [], [None], [1]]
VALIDATION = [micro_batch(rows, seed=900 + 10 * i) for i, rows in enumerate(VALIDATION_ROWS)]

# Rounding in float32: the reference sums over clips in another order, which gives differences of a few 1e-7 (one unit
# in the last place of a weight of 1 is 1.2e-7). A single step moves weights by up to 1e-2.
TOLERANCE = 5e-6

# Steps of the plan whose global gradients, before clipping, are compared: ranks that choose different members, a rank
# with text alone, micro-batches without samples.
GRADIENT_STEPS = (0, 3, 4)
# Of a tensor's largest gradient in the step. What is zero but for rounding is 1e-14.
GRADIENT_TOLERANCE = 1e-5
ROUNDING = 1e-12
# A router's gradient is a small difference of large terms: the reference itself in float64 is up to 3e-7 away in them.
ROUTER_ROUNDING = 2e-7


# ---- what the ranks do ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one rank hands back."""

    curve: dict[str, list[float]]
    chosen: list[list[int]]
    weights: dict[str, torch.Tensor]
    untouched: list[str]
    validation: ValidationResult
    noisy_curve: dict[str, list[float]]
    noisy_weights: dict[str, torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]


def _work() -> list[Outcome]:
    """Train under one stage after the other; processes that import everything once save a minute."""
    return [_train_and_validate(stage) for stage in STAGES]


def _train_and_validate(stage: int) -> Outcome:
    model, processor = make_model()
    steer_routers(model, processor)
    engine = make_engine(model, stage)
    engine.recorded_steps = GRADIENT_STEPS
    results = train(engine, processor, BATCHES)
    weights = engine.full_state_dict()
    validation = validate(engine, processor, VALIDATION[engine.rank :: engine.world_size])
    noisy, processor = _noisy_model()
    noisy_engine = make_engine(noisy, stage, clip_norm=0.0)
    noisy_results = train(noisy_engine, processor, BATCHES[2:6])
    return Outcome(
        curve(results),
        engine.chosen,
        weights,
        engine.untouched_parameters(),
        validation,
        curve(noisy_results),
        noisy_engine.full_state_dict(),
        engine.gradients,
    )


def _noisy_model() -> Any:
    """Everything trained, everything random, recomputed activations: harder to repeat on another rank."""
    model, processor = make_model(
        whole=True,
        dropout=0.1,
        router_top_k=2,
        router_noise=1.0,
        router_temperature=0.7,
        mowe_loss="importance_cv2",
        mowe_z_weight=0.1,
        spec_augment={"mask_prob": 0.2, "mask_length": 5},
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda size: f"{size}ranks")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[Outcome]]:
    """What the ranks returned, by rank and stage."""
    return run_ranks(_work, folder=tmp_path_factory.mktemp("ranks"), ranks=request.param)


@pytest.fixture(params=STAGES, ids=lambda stage: f"zero{stage}")
def ranks(request: pytest.FixtureRequest, outcomes: list[list[Outcome]]) -> list[Outcome]:
    """What the ranks returned under one ZeRO stage."""
    return [stages[request.param] for stages in outcomes]


# ---- the reference ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The same training in one process."""

    curve: dict[str, list[float]]
    model: MoweForConditionalGeneration
    weights: dict[str, torch.Tensor]
    gradients: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Whole global batches, dense execution, plain torch."""
    model, processor = make_model(router_execution="dense", mowe_loss_weight=0.1)
    steer_routers(model, processor)
    engine = plain_engine(model)
    numbers: dict[str, list[float]] = {"loss": [], "lm_loss": [], "routing_loss": [], "grad_norm": []}
    gradients = []
    for step, batches in enumerate(BATCHES):
        output = model(**collate(merged(batches), processor).inputs)
        engine.backward(output.loss, last=True)
        numbers["grad_norm"].append(engine.step(min(1.0, (step + 1) / WARMUP_STEPS)))
        gradients.append(engine.gradients)
        for name in ("loss", "lm_loss", "routing_loss"):
            numbers[name].append(float(getattr(output, name)))
    return Reference(numbers, model, weights_of(model), gradients)


@pytest.fixture(scope="module")
def noisy_reference() -> Reference:
    """The same micro-batches one after the other in plain torch: noise is drawn for each of them."""
    model, processor = _noisy_model()
    results = train(plain_engine(model, clip_norm=0.0), processor, BATCHES[2:6])
    return Reference(curve(results), model, weights_of(model), [])


def _assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - w).abs().max() / w.abs().max().clamp(min=1.0)) for name, w in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, wrong


# ---- the tests --------------------------------------------------------------------------------


def test_ranks_choose_different_members_in_the_same_step(ranks: list[Outcome]) -> None:
    for rank, outcome in enumerate(ranks):
        mine = [rows for lanes in PLAN for rows in dealt(lanes, rank, len(ranks), [])]
        assert outcome.chosen == [sorted({kind for kind in rows if kind is not None}) for rows in mine]
        assert len(mine) == 2 * len(PLAN)


def test_loss_curve_is_that_of_one_process(ranks: list[Outcome], reference: Reference) -> None:
    assert all(outcome.curve == ranks[0].curve for outcome in ranks)
    for name, values in reference.curve.items():
        assert ranks[0].curve[name] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), name
    assert {norm > CLIP_NORM for norm in reference.curve["grad_norm"]} == {True, False}


def test_every_gradient_is_that_of_one_process(ranks: list[Outcome], reference: Reference) -> None:
    for outcome in ranks:
        for step, found in zip(GRADIENT_STEPS, outcome.gradients, strict=True):
            # Plain torch has no gradient at all for a tensor that nothing used.
            one = {name: reference.gradients[step].get(name, torch.zeros_like(g)) for name, g in found.items()}
            assert found.keys() >= reference.gradients[step].keys()
            errors = {name: float((g - one[name]).abs().max()) for name, g in found.items()}
            assert {name: e for name, e in errors.items() if not e <= _allowed(name, one[name])} == {}, step


def _allowed(name: str, gradient: torch.Tensor) -> float:
    rounding = ROUTER_ROUNDING if "dependent_router" in name else ROUNDING
    return GRADIENT_TOLERANCE * float(gradient.abs().max()) + rounding


def test_every_weight_is_that_of_one_process(ranks: list[Outcome], reference: Reference) -> None:
    _assert_same_weights(ranks[0].weights, reference.weights)
    start, processor = make_model()
    steer_routers(start, processor)
    moved = {name for name, weight in start.state_dict().items() if not torch.equal(weight, reference.weights[name])}
    trainable = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    # Softmax ignores what a bias of the keys adds to all scores alike: only rounding moves it, if anything.
    assert {name for name in moved ^ trainable if not name.endswith("k_proj.bias")} == set()


def test_every_trainable_tensor_gets_a_gradient(ranks: list[Outcome]) -> None:
    assert [outcome.untouched for outcome in ranks] == [[]] * len(ranks)


def test_noise_follows_the_micro_batch_not_the_rank(ranks: list[Outcome], noisy_reference: Reference) -> None:
    assert all(outcome.noisy_curve == ranks[0].noisy_curve for outcome in ranks)
    for name, values in noisy_reference.curve.items():
        assert ranks[0].noisy_curve[name] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), name
    _assert_same_weights(ranks[0].noisy_weights, noisy_reference.weights)


def test_validation_is_that_of_one_process(ranks: list[Outcome], reference: Reference) -> None:
    _, processor = make_model()
    expected = validate(plain_engine(reference.model), processor, [b for b in VALIDATION if b.ids])
    for outcome in ranks:
        assert outcome.validation.answers == expected.answers
        assert outcome.validation.tasks == expected.tasks
        assert outcome.validation.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        for task, sums in expected.routing.items():
            for name, value in vars(sums).items():
                torch.testing.assert_close(getattr(outcome.validation.routing[task], name), value)
