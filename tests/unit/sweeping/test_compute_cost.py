"""Audio, operations and device time against what is counted by hand."""

from pathlib import Path

import pytest

from mowe_ray.config import RunConfig, load_config
from mowe_ray.sweeping.compute_cost import ComputeCost, device
from mowe_ray.sweeping.trials import ModelCost
from mowe_ray.training.datasets import index_sources
from mowe_ray.training.sampler import EpochSampler
from tests.planted_corpus import RATE, pulses, write_planted_corpus


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve clips of 0.6 to 1 s."""
    return write_planted_corpus(tmp_path, train=12, validation=2).train


SECONDS = sum(len(pulses(number)) for number in range(12)) / RATE


def configured(shards: Path | None, *overrides: str) -> RunConfig:
    data = "data.train=[]" if shards is None else f"data.train=[{{path: {shards}, weight: 2}}]"
    return load_config("quickstart", [data, *overrides])


def work(gflops: float = 500.0) -> ComputeCost:
    return ComputeCost(lambda config: ModelCost(1e6, 1e6, gflops))


def test_epochs_hear_the_weighted_mixture_so_often(shards: Path) -> None:
    config = configured(shards, "training.epochs=3")
    heard = work().audio(config)
    assert heard.seconds == pytest.approx(3 * 2 * SECONDS, rel=1e-4)
    assert not heard.at_most
    assert work().epoch(config).clips == 24


@pytest.mark.slow
@pytest.mark.parametrize(("largest", "micro_batches"), [(4, 1), (3, 2)])
def test_steps_hear_full_batches_of_mean_clips(shards: Path, largest: int, micro_batches: int) -> None:
    config = configured(shards, f"data.max_batch_size={largest}", f"training.gradient_accumulation={micro_batches}")
    order = list(
        EpochSampler(
            index_sources(config.data).train, config.data, seed=0, micro_batches_per_step=micro_batches, epochs=1
        )
    )
    config = configured(
        shards,
        f"data.max_batch_size={largest}",
        f"training.gradient_accumulation={micro_batches}",
        f"training.max_steps={len(order)}",
    )
    heard = work().audio(config)
    assert heard.seconds == pytest.approx(2 * SECONDS, rel=1e-4)  # the batches of this epoch are all full
    assert heard.at_most


def test_without_data_steps_hear_what_fits_and_epochs_are_unknown() -> None:
    overrides = ["training.max_steps=10", "data.batch_seconds=50", "compute.num_workers=[1, 3]"]
    heard = work().audio(configured(None, *overrides, "training.gradient_accumulation=2"))
    assert heard.seconds == 10 * 3 * 2 * 50
    assert heard.at_most
    unknown = configured(None, "training.epochs=3")
    assert work().epoch(unknown) is None
    assert work().audio(unknown) is None
    assert work().petaflop(unknown) is None


def test_training_is_three_forward_passes() -> None:
    config = configured(None, "training.max_steps=1000", "data.batch_seconds=60")
    # 500 GFLOPs for 30 s, so 1000 for a step, three times, 1000 times: 3e15.
    assert work(500.0).petaflop(config) == pytest.approx(3.0)
    assert ComputeCost(lambda config: None).petaflop(config) is None


def test_equal_models_are_counted_once() -> None:
    counted: list[RunConfig] = []
    counting = ComputeCost(lambda config: counted.append(config))
    for key in ("seed=1", "seed=2", "model.router.top_k=2", "training.epochs=7"):
        counting.cost(configured(None, key))
    assert [config.model.router.top_k for config in counted] == [1, 2]


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [("H100", 395.6), ("H200", 395.6), ("A100-80G", 124.8), ("L40S", 144.8), ("L4", 48.4), ("TPU-V4", None)],
)
def test_a_gpu_reaches_two_fifths_of_its_peak(kind: str, teraflops: float | None) -> None:
    on = device(load_config("paper", [f"compute.accelerator_type={kind}"]).compute)
    assert on.name == kind
    assert on.teraflops == (None if teraflops is None else pytest.approx(teraflops))
    assert ("unknown" in on.source) == (teraflops is None)


def test_what_is_assumed_is_said() -> None:
    gpu, cores = device(load_config("paper").compute), device(configured(None, "compute.cpus_per_worker=2").compute)
    assert gpu.name == "H100"
    assert "compute.accelerator_type is null" in gpu.source
    assert cores.name == "2 CPU cores"
    assert cores.teraflops == pytest.approx(2 * 0.012)
    assert "measured" in cores.source
