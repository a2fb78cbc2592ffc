"""What a run needs of its cluster: workers that fit, disks and shared memory."""

import math
import shutil
import tempfile
from itertools import product
from pathlib import Path

import pytest

from mowe_ray.config import load_config
from mowe_ray.distributed.preflight.requirements import (
    SCRATCH,
    SHARED_MEMORY,
    Space,
    check_capacity,
    check_disks,
    check_shared_memory,
    check_spilling,
    format_bundle,
    holds,
    measure,
    needs_of,
)
from mowe_ray.training.build import assemble
from tests.tiny_models import tiny_tokenizer
from tests.tiny_runs import TINY

WORKER = {"CPU": 4.0, "GPU": 1.0}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:A100": 1.0}
CPU_NODE = {"CPU": 32.0}


def total(*nodes: dict[str, float]) -> dict[str, float]:
    return {key: sum(node.get(key, 0.0) for node in nodes) for node in nodes for key in node}


def judge(bundle, workers, nodes, most=None, cpus=1.0):
    return check_capacity(bundle, workers, cpus, nodes, total(*nodes) if most is None else most)


def test_as_many_workers_as_fit_node_by_node() -> None:
    for cpus, gpus, need_cpus, need_gpus in product((3, 8, 16), (1, 4), (1, 3, 5), (1, 2)):
        left = {"CPU": cpus, "GPU": gpus}
        placed = 0
        while left["CPU"] >= need_cpus and left["GPU"] >= need_gpus:
            left = {"CPU": left["CPU"] - need_cpus, "GPU": left["GPU"] - need_gpus}
            placed += 1
        assert holds({"CPU": cpus, "GPU": gpus}, {"CPU": need_cpus, "GPU": need_gpus}) == placed


def test_enough_is_no_finding() -> None:
    assert judge(WORKER, (4, 4), [GPU_NODE, CPU_NODE]) == []
    assert judge(WORKER | {"accelerator_type:A100": 0.001}, (4, 4), [GPU_NODE]) == []


def test_a_sum_that_is_split_over_too_small_nodes_is_not_enough() -> None:
    (finding,) = judge({"CPU": 3.0}, (2, 2), [{"CPU": 4.0}, {"CPU": 2.0}])
    assert finding.status == "failed"
    assert "2 workers of 3 CPU" in finding.detail
    assert "more than 1" in finding.detail
    assert "compute.num_workers" in finding.fix


@pytest.mark.parametrize(
    ("bundle", "key", "told_why"),
    [
        ({"CPU": 4.0, "GPU": 8.0}, "compute.gpus_per_worker", "has is 4 GPU"),
        ({"CPU": 64.0}, "compute.cpus_per_worker", "has is 32 CPU"),
        ({"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}, "compute.accelerator_type", "accelerators are A100"),
        ({"CPU": 20.0, "GPU": 1.0}, "compute.cpus_per_worker", "none has all of it together"),
    ],
)
def test_a_worker_that_fits_no_node(bundle, key, told_why) -> None:
    (finding,) = judge(bundle, (1, 1), [GPU_NODE, CPU_NODE])
    assert finding.status == "failed"
    assert told_why in finding.detail
    assert format_bundle(bundle) in finding.detail
    assert key in finding.fix


def test_nodes_that_an_autoscaler_may_start_count() -> None:
    head = {"CPU": 0.0}
    assert judge(WORKER, (8, 8), [head], {"CPU": 64.0, "GPU": 8.0}, cpus=40) == []
    assert judge(WORKER, (8, 8), [head], {"CPU": math.inf, "GPU": math.inf}, cpus=40) == []
    accelerated = WORKER | {"accelerator_type:H100": 0.001}
    assert judge(accelerated, (8, 8), [head], {"CPU": 64.0, "GPU": 8.0}) == [], "told by the nodes when they are there"
    (finding,) = judge(WORKER, (8, 8), [head], {"CPU": 64.0, "GPU": 4.0})
    assert "more than 4" in finding.detail
    assert "autoscaler" in finding.fix


def test_decoding_needs_cpus_of_its_own() -> None:
    (finding,) = judge(WORKER, (4, 4), [GPU_NODE], cpus=20)
    assert finding.status == "failed"
    assert "20 CPUs" in finding.detail
    assert "data.decode_cpus" in finding.fix


def test_an_elastic_group_that_never_gets_whole_is_a_warning() -> None:
    (finding,) = judge(WORKER, (2, 8), [GPU_NODE])
    assert finding.status == "warning"
    assert "4 of 8" in finding.detail


MIB = 1 << 20


def test_folders_that_are_still_to_be_made_are_measured_where_they_will_be(tmp_path: Path) -> None:
    found = measure({"storage": str(tmp_path / "runs" / "mine")})
    assert found["storage"].folder == str(tmp_path / "runs" / "mine")
    assert found["storage"].total == shutil.disk_usage(tmp_path).total
    assert found[SCRATCH].folder == tempfile.gettempdir()
    assert found[SHARED_MEMORY].total == shutil.disk_usage("/dev/shm").total


def test_a_disk_that_is_too_small_for_the_run(small_disk: Path) -> None:
    found = {"a": measure({"storage": str(small_disk)}), "b": measure({"storage": "/"})}
    assert check_disks({"storage": 1 * MIB}, found) == []
    (finding,) = check_disks({"storage": 3 * MIB}, found)
    assert finding.status == "failed"
    assert f"2.0 MiB free in {small_disk} on a, and the run needs 3.0 MiB" in finding.detail


@pytest.mark.slow
def test_a_disk_that_ray_takes_for_full(small_disk: Path) -> None:
    assert check_spilling("Ray's folder", {"a": measure({"Ray's folder": str(small_disk)})}) == []
    (small_disk / "filler").write_bytes(bytes(round(1.95 * MIB)))
    (finding,) = check_spilling("Ray's folder", {"a": measure({"Ray's folder": str(small_disk)})})
    assert finding.status == "failed"
    assert "more than 95% full on a" in finding.detail


def test_shared_memory() -> None:
    docker = {SHARED_MEMORY: Space("/dev/shm", 64 * MIB, 64 * MIB)}
    roomy = {SHARED_MEMORY: Space("/dev/shm", 4096 * MIB, 8192 * MIB)}
    assert check_shared_memory({"a": roomy}, {"a": 4096.0 * MIB}) == []
    (finding,) = check_shared_memory({"a": docker, "b": roomy}, {"a": 1024.0 * MIB, "b": 1024.0 * MIB})
    assert finding.status == "warning"
    assert finding.detail.startswith("a: the object store (1.00 GiB) does not fit /dev/shm (64.0 MiB)")
    (finding,) = check_shared_memory({"a": docker}, {"a": 32.0 * MIB})
    assert "64.0 MiB of /dev/shm are free" in finding.detail


@pytest.mark.slow
def test_a_run_needs_what_its_trained_and_stored_weights_take() -> None:
    roomy = "model.language_model.config.vocab_size=500"  # the tokenizer adds no rows
    settings = ["training.max_steps=1", "training.keep_checkpoints=3", "storage=s3://bucket"]
    config = load_config("quickstart", [*TINY, roomy, *settings])
    model, _ = assemble(
        config.model, config.training.mowe_loss, seed=0, tokenizer=tiny_tokenizer(chat_template=False), gpu=False
    )
    stored = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needs = needs_of(config)
    assert needs.unknown == ()
    assert needs.gradients == 4 * trained
    assert needs.storage == 4 * 3 * 4 * trained + 4 * stored, "three checkpoints and a new one, of three tensors each"
    assert needs.scratch == 4 * stored + 3 * 4 * trained
    assert needs_of(config.model_copy(update={"storage": "runs"})).scratch == 4 * stored
