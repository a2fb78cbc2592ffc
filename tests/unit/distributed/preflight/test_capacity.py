"""Can the cluster ever hold the run?"""

import math
from itertools import product

import pytest

from mowe_ray.distributed.preflight.requirements import holds, judge_capacity, told

WORKER = {"CPU": 4.0, "GPU": 1.0}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:A100": 1.0}
CPU_NODE = {"CPU": 32.0}


def total(*nodes: dict[str, float]) -> dict[str, float]:
    return {key: sum(node.get(key, 0.0) for node in nodes) for node in nodes for key in node}


def judge(bundle, workers, nodes, most=None, cpus=1.0):
    return judge_capacity(bundle, workers, cpus, nodes, total(*nodes) if most is None else most)


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
    assert told(bundle) in finding.detail
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
