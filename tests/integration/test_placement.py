"""On a cluster of CPU and GPU nodes, decoding stays away from GPUs, and workers go where they are asked to."""

from typing import Any

import pytest

from tests.end_to_end import ROOT, run_command
from tests.ray_nodes import ray_nodes
from tests.tiny_runs import Corpus

pytestmark = [pytest.mark.slow, pytest.mark.soak]  # five nodes for a minute


@pytest.fixture(scope="module")
def found(tiny_corpus: Corpus) -> dict[str, Any]:
    with ray_nodes(PYTHONPATH=str(ROOT)) as nodes:
        nodes.add(8, "--num-gpus=2", "--node-name=gpu")
        nodes.add(8, "--num-gpus=1", "--node-name=a100", '--resources={"accelerator_type:A100": 1}')
        nodes.add(8, "--node-name=cpu")
        environment = {"RAY_ADDRESS": nodes.address}
        done = run_command(tiny_corpus.train, module="tests.where_it_runs", environment=environment, timeout_s=300)
    assert done.code == 0, done.err
    return done.result


def test_beside_a_gpu_decoding_runs_on_cpu_nodes(found: dict[str, Any]) -> None:
    reader, decoding = found["beside a GPU"]
    assert reader in ("gpu", "a100")
    assert decoding == {"cpu": 6}


def test_decoding_that_is_reserved_with_a_worker_runs_where_it_is(found: dict[str, Any]) -> None:
    reader, decoding = found["reserved"]
    assert decoding == {reader: 6}


def test_workers_share_a_node_and_go_to_the_accelerator_that_was_asked_for(found: dict[str, Any]) -> None:
    assert found["any"] == ["gpu", "gpu"]
    assert found["A100"] == ["a100"]
