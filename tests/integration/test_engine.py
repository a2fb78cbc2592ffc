"""The DeepSpeed engine on two ranks: checkpoints, exports, bfloat16, offloading, one rank instead of two."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModel

from mowe_ray.distributed.engine import deepspeed
from mowe_ray.model.export import export
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.reader import newest_checkpoint
from mowe_ray.training.checkpoint.writer import CheckpointWriter
from mowe_ray.training.collate import collate
from mowe_ray.training.protocols import Ranks
from tests.ranks import (
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
LARGE_BUCKET = 500_000_000  # DeepSpeed's default
Run = dict[str, Any]


def _engine(stage: int, *, bf16: bool = False, **settings: Any) -> Any:
    model, processor = make_model(dtype=torch.bfloat16 if bf16 else torch.float32)
    steer_routers(model, processor)
    model.register_buffer("seen", torch.tensor([-1, -1]))
    return make_engine(model, stage, bf16=bf16, **settings), processor


def _ranks(engine: Any) -> Ranks:
    return Ranks(engine.rank, engine.world_size, engine.gather, engine.all_reduce, print)


def _save(engine: Any, folder: Path) -> None:
    """Write the checkpoint of an engine that has made `SAVED_AFTER` steps."""
    writer = CheckpointWriter(RunFolder(str(folder), "run"), _ranks(engine), keep=1)
    writer.save(SAVED_AFTER, engine.snapshot(), lambda: {"note": "kept"})
    writer.wait(60, insist=True)


def _restored(folder: Path, stage: int, **settings: Any) -> Any:
    """Make an engine that continues from the checkpoint in `folder`."""
    engine, processor = _engine(stage, **settings)
    _restore(engine, folder)
    return engine, processor


def _restore(engine: Any, folder: Path) -> None:
    checkpoint = newest_checkpoint(RunFolder(str(folder), "run"), _ranks(engine))
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (SAVED_AFTER, {"note": "kept"})
    engine.restore(checkpoint)


def _whole(engine: Any) -> dict[str, torch.Tensor]:
    """Put the snapshots of all ranks together: each element is in exactly one."""
    wholes: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}
    for slices in engine.gather(engine.snapshot()):
        for name, tensor_slice in slices.items():
            whole = wholes.setdefault(name, torch.zeros(tensor_slice.shape, dtype=tensor_slice.data.dtype))
            times = written.setdefault(name, torch.zeros(tensor_slice.shape, dtype=torch.int64))
            elements = slice(tensor_slice.start, tensor_slice.start + tensor_slice.data.numel())
            whole.view(-1)[elements] = tensor_slice.data
            times.view(-1)[elements] += 1
    assert all((times == 1).all() for times in written.values())
    return wholes


def _what_deepspeed_says(engine: Any) -> dict[str, torch.Tensor]:
    """The moments of all trainable parameters by DeepSpeed's own functions; without ZeRO by AdamW itself."""
    moments = {}
    if engine._stage in (1, 2):
        # DeepSpeed links moments after the update of the first group, when the other groups have none yet.
        engine._engine.optimizer._hp_optimizer_states_linked = False
        engine._engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter.requires_grad and engine._stage:
                moments[f"{moment}/{name}"] = deepspeed.utils.safe_get_full_optimizer_state(parameter, moment).clone()
            elif parameter.requires_grad and parameter in engine._engine.basic_optimizer.state:
                moments[f"{moment}/{name}"] = engine._engine.basic_optimizer.state[parameter][moment].clone()
    return moments


def _with_checkpoint(folder: Path, stage: int, **settings: Any) -> Run:
    """Train with a save on the way, and continue from it in a new engine, and in the one that is ahead of it."""
    engine, processor = _engine(stage, **settings)
    first = train(engine, processor, BATCHES[:SAVED_AFTER])
    engine.model.seen.copy_(torch.tensor([engine.rank, 41]))
    _save(engine, folder)
    run: Run = {"saved": _whole(engine), "saved_weights": engine.full_state_dict(), "steps": engine.optimizer_steps}
    run["deepspeed"] = _what_deepspeed_says(engine)
    rest = train(engine, processor, BATCHES, start_step=SAVED_AFTER)
    run |= {"curve": curve([*first, *rest]), "weights": engine.full_state_dict()}
    makers = {"resumed": lambda: _restored(folder, stage, **settings)[0]}
    if not settings:
        makers["rewound"] = lambda: _restore(engine, folder) or engine
    for name, make in makers.items():
        other = make()
        run[f"{name}_whole"], run[f"{name}_deepspeed"] = _whole(other), _what_deepspeed_says(other)
        run[f"{name}_working"] = other.full_state_dict()
        run[f"{name}_curve"] = curve(train(other, processor, BATCHES, start_step=SAVED_AFTER))
        run[f"{name}_weights"] = other.full_state_dict()
    return run


def _with_bucket(stage: int, **bucket: int) -> Run:
    """Train two steps; `data_bytes` is the memory that their backwards had in use, touched or not."""
    gc.collect()
    used = [_data_bytes()]
    engine, processor = _engine(stage, **bucket)
    for parameter in engine.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _grad: used.append(_data_bytes()))
    numbers = curve(train(engine, processor, BATCHES[:2]))
    return {"curve": numbers, "data_bytes": max(used) - used[0], "weights": engine.full_state_dict()}


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))


def _two_ranks(folder: Path) -> dict[int, Run]:
    """Per stage and in several numerics: train with a save on the way."""
    runs = {}
    for stage in STAGES:
        runs[stage] = _with_checkpoint(folder / f"two{stage}", stage)
        if dist.get_rank() == 0:
            model, processor = make_model()
            weights = {name: w for name, w in runs[stage]["weights"].items() if name != "seen"}
            export(model, processor, folder / f"export{stage}", state_dict=weights)
        runs[stage]["bf16"] = _with_checkpoint(folder / f"two{stage}bf16", stage, bf16=True)
    return runs


def _two_ranks_offloaded(folder: Path) -> dict[int, Run]:
    """Per stage that offloads: the same offloaded, and with two sizes of buckets."""
    return {
        stage: {
            **_with_checkpoint(folder / f"two{stage}offload", stage, offload="cpu"),
            "own_bucket": _with_bucket(stage),
            "large_bucket": _with_bucket(stage, reduce_bucket_size=LARGE_BUCKET),
        }
        for stage in STAGES[1:]
    }


def _one_rank(folder: Path) -> dict[int, Run]:
    """Per stage: train undisturbed; and take a checkpoint of two ranks at another stage, hand it on and continue."""
    runs = {}
    for stage in STAGES:
        engine, processor = _engine(stage)
        half, _ = _engine(stage, bf16=True)
        run: Run = {"untrained": [(_whole(e), e.full_state_dict()) for e in (engine, half)]}
        run |= {"curve": curve(train(engine, processor, BATCHES)), "weights": engine.full_state_dict()}
        del run["weights"]["seen"]  # set before a save alone
        source = folder / f"two{_source(stage)}"
        engine, processor = _restored(source, stage)
        run |= {"whole": _whole(engine), "steps": engine.optimizer_steps}
        _save(engine, folder / f"one{stage}")
        run["continued_curve"] = curve(train(engine, processor, BATCHES, start_step=SAVED_AFTER))
        run["continued_weights"] = engine.full_state_dict()
        engine, _ = _restored(source.with_name(f"{source.name}bf16"), stage, bf16=True)
        run["bf16"] = {"whole": _whole(engine), "working": engine.full_state_dict()}
        runs[stage] = run
    return runs


def _three_ranks(folder: Path) -> dict[int, Run]:
    """Per stage: continue from what one rank at another stage handed on, offloaded where that is possible."""
    runs = {}
    for stage in STAGES:
        engine, processor = _restored(folder / f"one{_source(stage)}", stage, offload="cpu" if stage else "none")
        run: Run = {"whole": _whole(engine), "steps": engine.optimizer_steps}
        run["seen"] = engine.gather(engine.model.seen.tolist())
        run["continued_curve"] = curve(train(engine, processor, BATCHES, start_step=SAVED_AFTER))
        run["continued_weights"] = engine.full_state_dict()
        runs[stage] = run
    return runs


def _source(stage: int) -> int:
    """The stage whose checkpoint an engine at `stage` continues from, when the number of ranks changes."""
    return (stage + 1) % len(STAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[int, Run]:
    """What rank 0 of two returned, by ZeRO stage."""
    runs: dict[int, Run] = run_ranks(_two_ranks, folder, folder=folder / "two")[0]
    return runs


@pytest.fixture(scope="module")
def offloaded(folder: Path) -> dict[int, Run]:
    """The same with the optimizer's state in the memory of the CPU."""
    runs: dict[int, Run] = run_ranks(_two_ranks_offloaded, folder, folder=folder / "two_offloaded")[0]
    return runs


@pytest.fixture(scope="module")
def one_rank(two_ranks: dict[int, Run], folder: Path) -> dict[int, Run]:
    """The same for a single rank that accumulates all four micro-batches of a step."""
    runs: dict[int, Run] = run_ranks(_one_rank, folder, folder=folder / "one", ranks=1)[0]
    return runs


@pytest.fixture(scope="module")
def three_ranks(one_rank: dict[int, Run], folder: Path) -> dict[int, Run]:
    """What rank 0 of three returned, by ZeRO stage."""
    runs: dict[int, Run] = run_ranks(_three_ranks, folder, folder=folder / "three", ranks=3)[0]
    return runs


@pytest.fixture(params=STAGES, ids=lambda stage: f"zero{stage}")
def stage(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every tensor is the same to the bit."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert [name for name in found if found[name].dtype != expected[name].dtype] == []


@pytest.mark.parametrize(("numerics", "way"), [("fp32", "resumed"), ("fp32", "rewound"), ("bf16", "resumed")])
def test_resumed_training_repeats_itself(two_ranks: dict[int, Run], stage: int, numerics: str, way: str) -> None:
    assert_repeated(two_ranks[stage] if numerics == "fp32" else two_ranks[stage][numerics], way)


def assert_repeated(run: Run, way: str) -> None:
    """Training that was continued in this way is that of the engine that went on."""
    assert_same(run[f"{way}_whole"], run["saved"])
    assert_same(run[f"{way}_deepspeed"], run["deepspeed"])
    assert_same(run[f"{way}_working"], run["saved_weights"])
    for name, values in run[f"{way}_curve"].items():
        assert values == run["curve"][name][SAVED_AFTER:], name
    assert_same(run[f"{way}_weights"], run["weights"])
    assert any(not torch.equal(run["weights"][name], weight) for name, weight in run["saved_weights"].items())


def test_a_snapshot_is_what_deepspeed_holds(two_ranks: dict[int, Run], stage: int) -> None:
    for run in (two_ranks[stage], two_ranks[stage]["bf16"]):
        assert run["steps"] == int(run["saved"]["optimizer_steps"]) == SAVED_AFTER
        assert run["deepspeed"] or not stage
        for name, moment in run["deepspeed"].items():
            assert torch.equal(run["saved"][name], moment), name
        masters = {n.removeprefix("weight/"): w for n, w in run["saved"].items() if n.startswith("weight/")}
        assert all(weight.dtype == torch.float32 for weight in masters.values())
        assert_same(
            {name: weight.to(run["saved_weights"][name].dtype) for name, weight in masters.items()},
            {name: run["saved_weights"][name] for name in masters},
        )
        moments = [moment for name, moment in run["saved"].items() if name.startswith("exp_avg")]
        assert len(moments) == 2 * len(masters)
        assert sum(bool(moment.any()) for moment in moments) > len(masters)  # most have had a gradient


def test_before_the_first_step_nothing_has_been_updated(one_rank: dict[int, Run], stage: int) -> None:
    for snapshot, weights in one_rank[stage]["untrained"]:  # in bfloat16 too, where DeepSpeed begins with an update
        assert snapshot.keys() == one_rank[stage]["whole"].keys()
        assert int(snapshot["optimizer_steps"]) == 0
        assert not any(moment.any() for name, moment in snapshot.items() if name.startswith("exp_avg"))
        masters = {n.removeprefix("weight/"): w for n, w in snapshot.items() if n.startswith("weight/")}
        assert_same(masters, {name: weights[name].float() for name in masters})


def test_other_ranks_and_stages_continue(
    two_ranks: dict[int, Run], one_rank: dict[int, Run], three_ranks: dict[int, Run], stage: int
) -> None:
    # three ranks at `stage` took from one rank, which took from two; the stage changed each time
    between = _source(stage)
    first = two_ranks[_source(between)]
    for run in (one_rank[between], three_ranks[stage]):
        assert_same(run["whole"], first["saved"])
        assert run["steps"] == SAVED_AFTER
        for name, values in run["continued_curve"].items():
            # Sums in another order; see test_zero_equality for the size of the tolerance.
            assert values == pytest.approx(first["curve"][name][SAVED_AFTER:], rel=5e-6, abs=5e-6), name
        for name, weight in first["weights"].items():
            torch.testing.assert_close(run["continued_weights"][name], weight, rtol=5e-6, atol=5e-6, msg=name)
    assert three_ranks[stage]["seen"] == [[0, 41]] * 3  # buffers are rank 0's


def test_bfloat16_weights_follow_from_restored_masters(
    two_ranks: dict[int, Run], one_rank: dict[int, Run], stage: int
) -> None:
    saved, restored = two_ranks[_source(stage)]["bf16"], one_rank[stage]["bf16"]
    assert_same(restored["whole"], saved["saved"])
    assert_same(restored["working"], saved["saved_weights"])
    assert any(not torch.equal(w, w.bfloat16().float()) for n, w in saved["saved"].items() if n.startswith("weight/"))


def test_a_checkpoint_holds_trainable_tensors_alone(two_ranks: dict[int, Run], folder: Path, stage: int) -> None:
    trainable = {name: p.numel() for name, p in make_model()[0].named_parameters() if p.requires_grad}
    files = list((folder / f"two{stage}").rglob("*.safetensors"))
    assert len(files) == 2
    tensors = [load_file(file) for file in files]
    expected = {f"{kind}/{name}" for kind in ("weight", "exp_avg", "exp_avg_sq") for name in trainable}
    assert set().union(*tensors) == expected | {"buffer/seen", "optimizer_steps"}
    size = sum(file.stat().st_size for file in files)
    assert 0 <= size - 3 * 4 * sum(trainable.values()) <= 200 * sum(map(len, tensors))
    assert max(file.stat().st_size for file in files) < 0.7 * size  # shared out


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
    half = two_ranks[stage]["bf16"]["curve"]
    # bfloat16 has 8 bits of mantissa.
    assert half["lm_loss"] == pytest.approx(two_ranks[stage]["curve"]["lm_loss"], rel=2e-2)
    assert half["grad_norm"] == pytest.approx(two_ranks[stage]["curve"]["grad_norm"], rel=0.1)


@pytest.mark.soak  # by default three ranks continue offloaded, above
@pytest.mark.parametrize("stage", STAGES[1:])
def test_offloading_changes_nothing(two_ranks: dict[int, Run], offloaded: dict[int, Run], stage: int) -> None:
    assert_repeated(offloaded[stage], "resumed")
    for name, values in two_ranks[stage]["curve"].items():
        assert offloaded[stage]["curve"][name] == pytest.approx(values, rel=5e-6, abs=5e-6), name
    for name, weight in two_ranks[stage]["weights"].items():
        torch.testing.assert_close(offloaded[stage]["weights"][name], weight, rtol=5e-6, atol=5e-6, msg=name)


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_small_model_sets_no_large_bucket_aside(offloaded: dict[int, Run], stage: int) -> None:
    own, large = offloaded[stage]["own_bucket"], offloaded[stage]["large_bucket"]
    assert own["curve"] == large["curve"]
    assert_same(own["weights"], large["weights"])
    assert large["data_bytes"] - own["data_bytes"] > 0.9 * 4 * LARGE_BUCKET
