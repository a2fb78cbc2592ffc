"""What a run reserves, as values: no cluster is needed to add it up."""

import math

import numpy as np
import pytest

from mowe_ray.config import RunConfig, load_config
from mowe_ray.distributed.resources import (
    bundle_of,
    cpus_of,
    fits,
    ray_options,
    shortage,
    times_that_fit,
    total_resources,
    unreserved_decode_cpus,
    worker_bundle,
)


def configured(*overrides: str) -> RunConfig:
    return load_config("quickstart", ["compute.cpus_per_worker=3", "data.decode_cpus=2", *overrides])


GPU = ("compute.gpus_per_worker=1", "compute.accelerator_type=H100")


def test_a_worker_without_gpu_reserves_its_decoding() -> None:
    config = configured()
    assert bundle_of(config) == {"CPU": 5}
    assert unreserved_decode_cpus(config) == 0


def test_a_worker_on_a_gpu_node_leaves_its_decoding_to_any_node() -> None:
    config = configured(*GPU)
    assert bundle_of(config) == {"CPU": 3, "GPU": 1, "accelerator_type:H100": 0.001}
    assert unreserved_decode_cpus(config) == 2
    assert worker_bundle(config.compute) == bundle_of(config)


@pytest.mark.parametrize("gpu", [(), GPU])
def test_bundles_and_decoding_elsewhere_add_up_to_the_total(gpu: tuple[str, ...]) -> None:
    config = configured(*gpu)
    for workers in (1, 2, 7):
        total = total_resources(config.compute, config.data.decode_cpus, workers)
        assert total["CPU"] == workers * (bundle_of(config)["CPU"] + unreserved_decode_cpus(config))
        assert total["GPU"] == workers * bundle_of(config).get("GPU", 0)
        assert cpus_of(config, workers) == total["CPU"]


def test_a_task_asks_ray_for_the_bundle() -> None:
    assert ray_options({"CPU": 5}) == {"num_cpus": 5, "num_gpus": 0}
    assert ray_options(bundle_of(configured(*GPU))) == {"num_cpus": 3, "num_gpus": 1, "accelerator_type": "H100"}


def test_room_for_async_validation_is_what_it_reserves() -> None:
    """It looked for `cpus + decode_cpus` on one node, and reserved without decoding on a GPU node."""
    bundle = {"CPU": 3.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    gpu_node = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:H100": 1.0}
    assert not fits(bundle, [gpu_node], 2), "one CPU is left to decode on"
    assert fits(bundle, [gpu_node, {"CPU": 1.5}], 2)
    assert not fits(bundle, [gpu_node, {"CPU": 0.9}], 2), "a task takes a whole CPU of one node"
    assert not fits(bundle, [{"CPU": 9.0}, {"CPU": 9.0, "GPU": 1.0}], 2), "of another type"
    assert fits({"CPU": 5.0}, [{"CPU": 4.0}, {"CPU": 5.0}])
    assert not fits({"CPU": 5.0}, [{"CPU": 4.0}, {"CPU": 4.0}])


def test_fits_agrees_with_placing_every_task() -> None:
    """Brute force: choose the bundle's node, then place the tasks one by one."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        nodes = [{"CPU": float(rng.integers(0, 13)) / 2, "GPU": float(rng.integers(0, 2))} for _ in range(3)]
        cpus, elsewhere = float(rng.integers(1, 4)), int(rng.integers(0, 6))
        placeable = False
        for chosen in (n for n, node in enumerate(nodes) if node["CPU"] >= cpus and node["GPU"] >= 1):
            left = [node["CPU"] - (cpus if n == chosen else 0.0) for n, node in enumerate(nodes)]
            placed = 0
            while placed < elsewhere and any(free >= 1 for free in left):
                left[next(n for n, free in enumerate(left) if free >= 1)] -= 1
                placed += 1
            placeable |= placed == elsewhere
        assert fits({"CPU": cpus, "GPU": 1.0}, nodes, elsewhere) == placeable


def test_runs_that_a_cluster_holds_at_a_time() -> None:
    assert times_that_fit({"CPU": 4, "GPU": 0}, {"CPU": 11.0}) == 2
    assert times_that_fit({"CPU": 4, "GPU": 2}, {"CPU": 100.0, "GPU": 5.0}) == 2
    assert times_that_fit({"CPU": 4, "GPU": 1}, {"CPU": 100.0}) == 0
    assert times_that_fit({"CPU": 4, "GPU": 1}, {"CPU": math.inf, "GPU": math.inf}) == math.inf


def test_a_run_starts_waits_or_is_refused() -> None:
    need, here = {"CPU": 8, "GPU": 2}, {"CPU": 8.0, "GPU": 1.0}
    assert shortage({"CPU": 8, "GPU": 1}, here, here) is None
    assert shortage(need, here, {"CPU": 8.0, "GPU": 2.0}) == (
        "the run needs 2 GPUs and the cluster has 1: waiting for its autoscaler"
    )
    with pytest.raises(ValueError, match="needs 2 GPUs and the cluster has 1: lower compute"):
        shortage(need, here, here)
    with pytest.raises(ValueError, match="needs 9 CPUs and the cluster has 8: lower compute"):
        shortage({"CPU": 9}, here, {"CPU": 8.0})
