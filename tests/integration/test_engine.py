"""The DeepSpeed engine on two ranks: checkpoints, exports, bfloat16, offloading, one rank instead of two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from mowe_ray.model.exporting import export
from mowe_ray.training.batch import collate
from tests.two_ranks import (
    Row,
    curve,
    make_engine,
    make_model,
    micro_batch,
    plain_engine,
    run_ranks,
    steer_routers,
    train,
)

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
PLAN: list[list[list[Row]]] = [[[0], [1], [2], [0, 1]], [[1], [2], [], [4]], [[2, 3], [None], [1], [0]]]
BATCHES = [
    [micro_batch(rows, seed=100 * step + 10 * lane) for lane, rows in enumerate(lanes)]
    for step, lanes in enumerate(PLAN)
]
SAVED_AFTER = 2
Run = dict[str, Any]


def _engine(stage: int, **settings: Any) -> Any:
    model, processor = make_model()
    steer_routers(model, processor)
    return make_engine(model, stage, **settings), processor


def _two_ranks(folder: Path) -> dict[int, Run]:
    """Per stage: train with a save on the way, continue from it in a new engine, then in other numerics."""
    runs = {}
    for stage in STAGES:
        checkpoint = folder / f"stage{stage}"
        engine, processor = _engine(stage)
        first = train(engine, processor, BATCHES[:SAVED_AFTER])
        engine.save(checkpoint, {"step": SAVED_AFTER, "note": "kept"})
        rest = train(engine, processor, BATCHES, start_step=SAVED_AFTER)
        run: Run = {"curve": curve([*first, *rest]), "weights": engine.full_state_dict()}
        if engine.rank == 0:
            export(engine.model, processor, folder / f"export{stage}", state_dict=run["weights"])
        other, processor = _engine(stage)
        run["state"] = other.load(checkpoint)
        run["resumed_curve"] = curve(train(other, processor, BATCHES, start_step=SAVED_AFTER))
        run["resumed_weights"] = other.full_state_dict()
        half, processor = _engine(stage, bf16=True)
        run["bf16"] = curve(train(half, processor, BATCHES))
        if stage:
            offloaded, processor = _engine(stage, offload="cpu")
            run["offloaded_curve"] = curve(train(offloaded, processor, BATCHES))
            run["offloaded_weights"] = offloaded.full_state_dict()
        runs[stage] = run
    return runs


def _one_rank() -> dict[int, Run]:
    runs = {}
    for stage in STAGES:
        engine, processor = _engine(stage)
        runs[stage] = {"curve": curve(train(engine, processor, BATCHES)), "weights": engine.full_state_dict()}
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[int, Run]:
    """What rank 0 of two returned, by ZeRO stage."""
    runs: dict[int, Run] = run_ranks(_two_ranks, folder, folder=folder / "two")[0]
    return runs


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[int, Run]:
    """The same for a single rank that accumulates all four micro-batches of a step."""
    runs: dict[int, Run] = run_ranks(_one_rank, folder=folder / "one", ranks=1)[0]
    return runs


@pytest.fixture(params=STAGES, ids=lambda stage: f"zero{stage}")
def stage(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def test_resumed_training_repeats_itself(two_ranks: dict[int, Run], stage: int) -> None:
    run = two_ranks[stage]
    assert run["state"]["step"] == SAVED_AFTER
    assert run["state"]["note"] == "kept"
    for name, values in run["resumed_curve"].items():
        assert values == run["curve"][name][SAVED_AFTER:], name
    for name, weight in run["weights"].items():
        assert torch.equal(run["resumed_weights"][name], weight), name


def test_one_rank_does_what_two_do(two_ranks: dict[int, Run], one_rank: dict[int, Run], stage: int) -> None:
    two, one = two_ranks[stage], one_rank[stage]
    for name, values in one["curve"].items():
        # Sums in another order; see test_zero_equality for the size of the tolerance.
        assert two["curve"][name] == pytest.approx(values, rel=5e-6, abs=5e-6), name
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=5e-6, atol=5e-6, msg=name)


def test_export_computes_what_was_trained(two_ranks: dict[int, Run], folder: Path, stage: int) -> None:
    model, processor = make_model()
    steer_routers(model, processor)
    train(plain_engine(model), processor, BATCHES)
    exported = AutoModel.from_pretrained(folder / f"export{stage}")
    inputs = collate(micro_batch([0, None, 2, 4], seed=77), processor).inputs
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        # Merging LoRA adapters rounds once more.
        torch.testing.assert_close(exported.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_learns_under_every_stage(two_ranks: dict[int, Run], stage: int) -> None:
    half = two_ranks[stage]["bf16"]
    # bfloat16 has 8 bits of mantissa.
    assert half["lm_loss"] == pytest.approx(two_ranks[stage]["curve"]["lm_loss"], rel=2e-2)
    assert half["grad_norm"] == pytest.approx(two_ranks[stage]["curve"]["grad_norm"], rel=0.1)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_offloading_changes_nothing(two_ranks: dict[int, Run], stage: int) -> None:
    run = two_ranks[stage]
    for name, values in run["curve"].items():
        assert run["offloaded_curve"][name] == pytest.approx(values, rel=5e-6, abs=5e-6), name
    for name, weight in run["weights"].items():
        torch.testing.assert_close(run["offloaded_weights"][name], weight, rtol=5e-6, atol=5e-6, msg=name)
