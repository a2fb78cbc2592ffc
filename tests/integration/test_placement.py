"""On a cluster of CPU and GPU nodes, decoding stays away from GPUs, and workers go where they are asked to."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.end_to_end import ROOT
from tests.ray_nodes import ray_nodes
from tests.tiny_runs import Corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tiny_corpus: Corpus) -> dict[str, Any]:
    with ray_nodes(PYTHONPATH=str(ROOT)) as nodes:
        nodes.add(8, "--num-gpus=2", "--node-name=gpu")
        nodes.add(8, "--num-gpus=1", "--node-name=a100", '--resources={"accelerator_type:A100": 1}')
        nodes.add(8, "--node-name=cpu")
        done = subprocess.run(
            [sys.executable, "-m", "tests.where_it_runs", str(tiny_corpus.train)],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": nodes.address},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
