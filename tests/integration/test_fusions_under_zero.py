"""Routers, fusions and adapters on one and two ranks under ZeRO give the losses and gradients of one plain process.

A table of cases holds every pair of router, fusion, execution, number of ranks and ZeRO stage at least once. The
reference puts the global batch of a step through the model in one forward that runs every encoder on every clip.
"""

from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch

from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.training.collate import collate
from tests.ranks import KINDS, Row, make_engine, make_model, merged, micro_batch, plain_engine, run_ranks, train

pytestmark = pytest.mark.slow

ROUTERS: dict[str, dict[str, Any]] = {
    "audio": {"router_top_k": 2},
    "prompt": {"router_input": "prompt", "router_hidden": 6},
    "frames": {"router_input": "audio+prompt", "router_granularity": "frame", "router_top_k": 2},
    "independent": {"router_data_dependent": False},
    "dependent": {"router_data_independent": False, "router_granularity": "frame"},
}
FUSIONS = ("routed", "sum", "cross_attention", "latents", "concat", "average")
STAGES = (0, 2, 3)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    router: str
    fusion: str
    execution: str
    pool_dropout: bool
    ranks: int
    stage: int

    @property
    def options(self) -> dict[str, Any]:
        adapter = "moe_mlp" if self.fusion == "sum" else "seqcnn"
        return ROUTERS[self.router] | {"fusion": self.fusion, "adapter": adapter}


def table() -> list[Case]:
    """Every router with every fusion; the rest in turn, so that all pairs meet."""
    return [
        Case(
            router,
            fusion,
            ("sparse", "dense")[(i // 2 + j // 3) % 2],
            (i + j) % 4 < 2,
            1 + (i + j) % 2,
            STAGES[(i + 2 * j) % 3],
        )
        for i, router in enumerate(ROUTERS)
        for j, fusion in enumerate(FUSIONS)
    ]


# Per step the rows of four micro-batches, as in test_zero_equality.
PLAN: list[list[list[Row]]] = [
    [[0, 2], [1], [None], [3, 4]],
    [[1], [0, None, 0], [], [4]],
]
BATCHES = [
    [micro_batch(rows, seed=100 * step + 10 * lane) for lane, rows in enumerate(lanes)]
    for step, lanes in enumerate(PLAN)
]
TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 2e-5  # of a tensor's largest gradient
ROUNDING = 2e-7


def decided_model(case: Case) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Build a model whose routers choose differently for clips, instructions and frames, and whose gates are open."""
    model, processor = make_model(router_execution=case.execution, mowe_loss_weight=0.1, **case.options)
    router = model.audio_tower.dependent_router
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(0.8)
        if router is not None:
            router.weight.mul_(100)
            # Clips and instructions that differ: what is centred at a single one ties there, and rounding would decide.
            inputs = collate(micro_batch([*range(KINDS)]), processor).inputs
            logits = model.eval()(**inputs).routing.dependent.logits
            router.bias.sub_(logits.flatten(0, -2).mean(0))
    return model.train(), processor


@dataclass(frozen=True)
class Outcome:
    """Losses of both steps, and the global gradients of the second before clipping."""

    losses: list[float]
    parts: list[float]
    gradients: dict[str, torch.Tensor]


def _outcome(engine: Any, processor: MoweProcessor, plan: Any, case: Case, gradients: Any) -> Outcome:
    results = train(engine, processor, plan, dropped_pool=KINDS if case.pool_dropout else 0)
    parts = [part for result in results for part in result.routing_losses.values()]
    return Outcome([result.loss for result in results], parts, gradients())


def _work(cases: list[Case]) -> list[Outcome]:
    """Train every case; processes that import everything once save a minute."""
    outcomes = []
    for case in cases:
        model, processor = decided_model(case)
        engine = make_engine(model, case.stage)
        engine.recorded_steps = (1,)
        outcomes.append(_outcome(engine, processor, BATCHES, case, lambda engine=engine: engine.gradients[0]))
    return outcomes


def _reference(case: Case) -> Outcome:
    model, processor = decided_model(replace(case, execution="dense"))
    engine = plain_engine(model)
    return _outcome(engine, processor, [[merged(step)] for step in BATCHES], case, lambda: engine.gradients)


def test_the_table_holds_every_pair() -> None:
    rows = [[getattr(case, field.name) for field in fields(case)] for case in table()]
    columns = list(zip(*rows, strict=True))
    for one, other in combinations(range(len(columns)), 2):
        assert {(row[one], row[other]) for row in rows} == set(product(set(columns[one]), set(columns[other])))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "router"),
    [
        *((2, router) for router in ("audio", "prompt", "frames")),
        *(pytest.param(2, router, marks=pytest.mark.soak) for router in ("independent", "dependent")),
        *(pytest.param(1, router, marks=pytest.mark.soak) for router in ROUTERS),
    ],
)
def test_losses_and_gradients_are_those_of_one_plain_process(ranks: int, router: str, tmp_path: Any) -> None:
    cases = [case for case in table() if (case.ranks, case.router) == (ranks, router)]
    found = run_ranks(_work, cases, folder=tmp_path / "ranks", ranks=ranks)
    for number, case in enumerate(cases):
        wanted = _reference(case)
        for outcomes in found:
            outcome = outcomes[number]
            assert outcome.losses == pytest.approx(wanted.losses, rel=TOLERANCE), case
            assert outcome.parts == pytest.approx(wanted.parts, rel=TOLERANCE, abs=TOLERANCE), case
            assert outcome.gradients.keys() >= wanted.gradients.keys(), case
            one = {name: wanted.gradients.get(name, torch.zeros_like(g)) for name, g in outcome.gradients.items()}
            errors = {name: float((g - one[name]).abs().max()) for name, g in outcome.gradients.items()}
            allowed = {name: GRADIENT_TOLERANCE * float(one[name].abs().max()) + ROUNDING for name in errors}
            assert {name: (e, allowed[name]) for name, e in errors.items() if not e <= allowed[name]} == {}, case
