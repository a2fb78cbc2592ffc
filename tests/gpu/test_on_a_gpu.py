"""What only a GPU can show. Each test also runs on the CPU (`make soak`): the first GPU is not to test the tests.

Kernels of a GPU add in another order than those of the CPU and, with atomics, than themselves: where two runs
are compared, the tolerance is that of bfloat16, 2^-8.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import AutoModel

from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.export import export
from mowe_ray.model.frontends import KaldiFbank, LogMel, NormalisedWave
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.collate import collate
from mowe_ray.training.fault_tolerance.out_of_memory import MicroBatchOutOfMemory, OutOfMemoryRecords, record, release
from mowe_ray.training.fault_tolerance.watchdog import ActivityTracker, Hang, Watchdog
from mowe_ray.training.loop import training_steps
from tests.integration import test_engine as engine_tests
from tests.ranks import curve, make_model, merged, micro_batch, plain_engine, run_ranks, steer_routers, train

pytestmark = pytest.mark.slow

BFLOAT16 = 2.0**-8


def _gpus(count: int) -> list[Any]:
    # The same tests run on the CPU as soak: a machine without GPUs skips their second half, not what they say.
    missing = pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} CUDA devices")
    return [pytest.param("cpu", marks=pytest.mark.soak), pytest.param("cuda", marks=[pytest.mark.gpu, missing])]


one_device = pytest.mark.parametrize("device", _gpus(1))
two_devices = pytest.mark.parametrize("device", _gpus(2))


def _inputs(processor: Any, device: str, rows: int = 5) -> dict[str, Any]:
    batch = collate(merged([micro_batch([n % 5], seed=n) for n in range(rows)]), processor)
    return batch.on(device).model_inputs


@contextmanager
def tf32_allowed() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@one_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_equals_dense(device: str, dtype: torch.dtype) -> None:
    model, processor = make_model()
    steer_routers(model, processor)
    model.to(device).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    logits = {}
    for execution in ("sparse", "dense"):
        assert model.audio_tower.pool is not None
        model.audio_tower.pool.execution = execution
        with torch.no_grad():
            logits[execution] = model(**_inputs(processor, device)).logits.float()
    scale = float(logits["dense"].abs().max())
    assert (logits["sparse"] - logits["dense"]).abs().max() <= scale * (
        4 * BFLOAT16 if dtype == torch.bfloat16 else 1e-5
    )


def _resumed(folder: str) -> dict[str, Any]:
    """Train three steps; then the third one again, from the checkpoint after the second."""
    engine, processor = engine_tests._engine(2, bf16=True)
    saved_after = engine_tests.SAVED_AFTER
    results = train(engine, processor, engine_tests.BATCHES[:saved_after])
    engine_tests._save(engine, Path(folder))
    results += train(engine, processor, engine_tests.BATCHES, start_step=saved_after)
    undisturbed = engine.full_state_dict()
    resumed, processor = engine_tests._restored(Path(folder), 2, bf16=True)
    again = train(resumed, processor, engine_tests.BATCHES, start_step=saved_after)
    return {
        "device": str(engine.device),
        "curves": (curve(results[saved_after:]), curve(again)),
        "weights": (undisturbed, resumed.full_state_dict()),
    }


@one_device
def test_resume_equals_undisturbed(device: str, tmp_path: Path) -> None:
    (run,) = run_ranks(_resumed, str(tmp_path / "run"), folder=tmp_path, ranks=1, device=device)
    assert run["device"].startswith(device)
    undisturbed, resumed = run["curves"]
    for name, values in undisturbed.items():
        assert resumed[name] == pytest.approx(values, rel=BFLOAT16), name
    for name, weight in run["weights"][0].items():
        torch.testing.assert_close(run["weights"][1][name], weight, rtol=BFLOAT16, atol=1e-3)


def _bf16_curve() -> dict[str, list[float]]:
    engine, processor = engine_tests._engine(2, bf16=True)
    return curve(train(engine, processor, engine_tests.BATCHES))


@two_devices
def test_two_ranks_train_as_one_in_bfloat16(device: str, tmp_path: Path) -> None:
    (one,) = run_ranks(_bf16_curve, folder=tmp_path / "one", ranks=1, device=device)
    two = run_ranks(_bf16_curve, folder=tmp_path / "two", ranks=2, device=device)
    assert two[0] == two[1]
    for name, values in one.items():
        assert two[0][name] == pytest.approx(values, rel=4 * BFLOAT16), name


@contextmanager
def _room_for(device: str, model: MoweForConditionalGeneration, clips: int) -> Iterator[None]:
    """Let only micro-batches of up to about `clips` clips fit: on a GPU by its allocator, on the CPU by a hook."""
    if device == "cpu":

        def refuse(_model: Any, _arguments: Any, inputs: dict[str, Any]) -> None:
            if len(inputs["input_lengths"]) > clips:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
        yield
        hook.remove()
        return
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * peak / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@one_device
def test_a_micro_batch_that_does_not_fit_is_tried_in_halves(device: str, tmp_path: Path) -> None:
    model, processor = make_model(whole=True)
    engine = plain_engine(model.to(device))
    engine.device = torch.device(device)
    folder, rows, samples = RunFolder(str(tmp_path), "run"), 96, 48

    def step(numbers: Any) -> None:
        clips = [micro_batch([int(n) % 5], seed=int(n)) for n in numbers]
        next(training_steps(engine, [(1, 1.0, [collate(merged(clips), processor)])], seed=0))

    step(range(samples))  # what a half needs
    planned = [torch.arange(rows).numpy()]
    with _room_for(device, model, samples):
        with pytest.raises(MicroBatchOutOfMemory) as raised:
            step(planned[0])
        engine.optimizer.zero_grad()
        release(raised.value)
        record(folder, raised.value, rank=0, rows=planned[0])
        halves = OutOfMemoryRecords.load(folder).apply(planned)
        assert [len(half) for half in halves] == [samples, samples]
        for half in halves:
            step(half)


def _hang(folder: str) -> list[Hang]:
    """Rank 1 comes to a collective only after rank 0's watchdog has reported that nobody comes."""
    engine, _ = engine_tests._engine(0)
    reported, hangs = Path(folder, "reported"), list[Hang]()
    engine.all_reduce(torch.ones(1))  # connections are made before anything is timed

    def on_hang(hang: Hang) -> None:
        hangs.append(hang)
        reported.touch()

    if engine.rank == 0:
        watchdog = Watchdog(ActivityTracker(), 2.0, on_hang)
        watchdog.begin(7)
        assert engine.all_reduce(torch.ones(1)).tolist() == [2.0]
        watchdog.close()
        return hangs
    while not reported.exists():
        time.sleep(0.1)
    engine.all_reduce(torch.ones(1))
    return []


@two_devices
def test_a_collective_that_hangs_is_reported(device: str, tmp_path: Path) -> None:
    (hang,), nothing = run_ranks(_hang, str(tmp_path), folder=tmp_path, device=device)
    assert nothing == []
    assert (hang.step, hang.seconds >= 2.0) == (7, True)
    assert "in _hang" in hang.stacks


@one_device
def test_a_trained_bfloat16_model_equals_its_export(device: str, tmp_path: Path) -> None:
    model, processor = make_model(whole=True, dtype=torch.bfloat16)
    engine = plain_engine(model.to(device))
    engine.device = torch.device(device)
    train(engine, processor, [[micro_batch([0, 1, 2])], [micro_batch([3, 4])]])
    export(model.eval(), processor, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).to(device).eval()
    with torch.no_grad():
        ours, theirs = (one(**_inputs(processor, device)).logits for one in (model, loaded))
    assert torch.equal(ours, theirs)


@one_device
@pytest.mark.parametrize("front_end", [LogMel(), KaldiFbank(), NormalisedWave()], ids=lambda one: one.kind)
def test_front_ends_equal_the_cpus_where_tf32_is_allowed(device: str, front_end: Any) -> None:
    """TF32 would be 1e-4 off in a logarithm; noise has no quiet bands, where rounding of the FFT alone is as large."""
    wave = torch.randn(3, 32_000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([32_000, 20_000, 32_000])
    wanted = front_end(wave, lengths, 40_000)
    with tf32_allowed():
        found = front_end(wave.to(device), lengths.to(device), 40_000)
    assert found.device.type == device
    assert (found.cpu() - wanted).abs().max() < 2e-5


class AttentionCalls(TorchFunctionMode):
    """Records whether each fused attention was given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.masked.append((args[3] if len(args) > 3 else kwargs.get("attn_mask")) is not None)
        return func(*args, **kwargs)


@one_device
def test_training_rows_and_whisper_run_in_flash_attention(device: str) -> None:
    """In bfloat16, without a mask; the context refuses every other kernel, forward and backward."""
    model, processor = make_model(whole=True, dtype=torch.bfloat16)
    model.to(device).train()
    inputs = _inputs(processor, device)
    for part, run in {
        "language model": lambda: (
            model.language_model(
                inputs_embeds=torch.randn(2, 64, 32, dtype=torch.bfloat16, device=device, requires_grad=True),
                use_cache=False,
            ).logits
        ),
        "base encoder": lambda: model.audio_tower.base_encoder(
            model.audio_tower.base_encoder.front_end(inputs["input_values"], inputs["input_lengths"].to(device), 80_000)
        ),
    }.items():
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), AttentionCalls() as calls:
            run().float().square().mean().backward()
        assert calls.masked, part
        assert not any(calls.masked), part
