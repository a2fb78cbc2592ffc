"""`python -m mowe_ray.preflight` on a cluster of several nodes: healthy, and with faults that are there for real."""

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperConfig, WhisperModel

from tests.end_to_end import ROOT, Finished, run_command
from tests.ray_nodes import Nodes, ray_nodes
from tests.tiny_runs import Corpus, tiny_arguments

pytestmark = pytest.mark.slow

# As on a shared cluster; and nodes find the package as they would in an image that has it.
ACCESS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes(**ACCESS) as started:
        started.add(2, "--node-name=first")
        started.add(2, "--node-name=second")
        yield started


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small Whisper."""
    folder: Path = tmp_path_factory.mktemp("models")
    sizes = {"d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 20}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    WhisperModel(WhisperConfig(encoder_layers=1, **sizes, **decoder, **tokens)).save_pretrained(folder)
    return folder


def preflight(nodes: Nodes, corpus: Corpus, storage: Path, model: Path, *overrides: str) -> Finished:
    access = {**ACCESS, "RAY_ADDRESS": nodes.address}
    arguments = [*tiny_arguments(corpus, storage, "checked"), f"model.base_encoder={model}"]
    arguments += ["training.max_steps=2", *overrides]
    done = run_command(*arguments, module="mowe_ray.preflight", environment=access, timeout_s=300)
    print(done.err)
    return done


def checks(done: Finished) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in done.result["checks"]}


@pytest.fixture(scope="module")
def healthy(nodes: Nodes, tiny_corpus: Corpus, storage: Path, model: Path) -> Finished:
    return preflight(nodes, tiny_corpus, storage, model, "compute.num_workers=2")


@pytest.mark.soak  # a minute
def test_a_healthy_cluster_passes(healthy: Finished, storage: Path, model: Path, tiny_corpus: Corpus) -> None:
    assert healthy.code == 0, healthy.err
    assert healthy.result["preflight"] == "ok"
    found = checks(healthy)
    assert [check["name"] for check in found.values() if check["status"] != "ok"] == []
    assert "2 would run on first, second" in found["workers"]["detail"]
    assert "same on 4 machines" in found["versions"]["detail"], "three nodes and the driver"
    assert str(model) in found["checkpoints"]["detail"]
    assert str(tiny_corpus.train) in found["audio"]["detail"]
    assert "2 workers on 2 nodes" in found["round trip"]["detail"]
    assert "GB/s" in found["round trip"]["detail"]
    assert list(storage.iterdir()) == [], "nothing stays behind"


@pytest.fixture(scope="module")
def faulty(nodes: Nodes, tiny_corpus: Corpus, storage: Path, model: Path, tmp_path_factory: Any) -> Finished:
    """The same, with two nodes more that have something wrong, for a run that needs more GPUs than there are."""
    shadow = tmp_path_factory.mktemp("shadow") / "peft-0.1.dist-info"
    shadow.mkdir()
    (shadow / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    _add_with_mounts(
        nodes,
        f"mount --bind {storage} {storage} && mount -o remount,bind,ro {storage} && mount -t tmpfs none {model}",
        "--node-name=drifted",
        PYTHONPATH=f"{shadow.parent}:{ROOT}",
    )
    _add_with_mounts(
        nodes, f"mount -t tmpfs none {storage} && mount -t tmpfs none {tiny_corpus.train}", "--node-name=elsewhere"
    )
    return preflight(nodes, tiny_corpus, storage, model, "compute.num_workers=2", "compute.gpus_per_worker=1")


on_faulty_nodes = pytest.mark.soak  # a minute and a half; what checks say of what they found: tests/unit


def _add_with_mounts(nodes: Nodes, mount: str, *options: str, **environment: str) -> None:
    """Start a node that alone sees these mounts."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount file systems for one process here")
    nodes.add(1, *options, inside=["unshare", "--mount", "sh", "-ec", f'{mount}; exec "$@"', "sh"], **environment)


@on_faulty_nodes
def test_faults_make_the_command_fail(faulty: Finished) -> None:
    assert faulty.code == 1
    assert faulty.result["preflight"] == "failed"
    failed = [check for check in checks(faulty).values() if check["status"] == "failed"]
    assert all(check["fix"] for check in failed)
    assert [check["name"] for check in failed] == ["capacity", "versions", "storage", "checkpoints", "audio"]
    for check in failed:
        assert f"FAILED   {check['name']}" in faulty.err
        assert f"-> {check['fix']}" in faulty.err


@on_faulty_nodes
def test_gpus_that_can_never_be_had(faulty: Finished) -> None:
    capacity = checks(faulty)["capacity"]
    assert "1 GPU" in capacity["detail"]
    assert "the most that one has is 0 GPU" in capacity["detail"]
    assert "compute.gpus_per_worker" in capacity["fix"]
    assert "round trip" not in checks(faulty), "workers that cannot start are not waited for"


@on_faulty_nodes
def test_a_node_with_another_version(faulty: Finished) -> None:
    versions = checks(faulty)["versions"]
    assert "peft: 0.1 on drifted" in versions["detail"]
    assert "transformers" not in versions["detail"]
    assert "peft" in versions["fix"]


@on_faulty_nodes
def test_storage_that_a_node_may_not_write(faulty: Finished, storage: Path) -> None:
    found = checks(faulty)["storage"]
    assert f"drifted cannot write to {storage}" in found["detail"]
    assert "Read-only" in found["detail"]
    assert found["fix"].startswith("storage: ")


@on_faulty_nodes
def test_storage_that_is_another_folder_on_a_node(faulty: Finished, storage: Path) -> None:
    detail = checks(faulty)["storage"]["detail"]
    assert f"{storage} is not one folder" in detail
    assert detail.endswith("| elsewhere"), detail
    assert "drifted" in detail.partition("each other's files")[2].partition("|")[0], "it reads what the others wrote"
    assert list(storage.iterdir()) == [], "nothing stays behind"


@on_faulty_nodes
def test_a_checkpoint_that_a_node_does_not_have(faulty: Finished) -> None:
    found = checks(faulty)["checkpoints"]
    assert found["detail"].startswith("model.base_encoder: drifted: ")
    assert "config.json" in found["detail"]
    assert found["fix"].startswith("model.base_encoder: ")


@on_faulty_nodes
def test_audio_that_a_node_does_not_have(faulty: Finished) -> None:
    found = checks(faulty)["audio"]
    assert found["detail"].startswith("data.train.0.path: elsewhere: ")
    assert "validation" not in found["detail"]


def test_a_wrong_key_is_refused_before_anything_starts() -> None:
    done = run_command("compute.num_worker=2", module="mowe_ray.preflight", environment={"RAY_ADDRESS": "nowhere"})
    assert done.code == 2
    assert "compute.num_workers" in done.err


def test_a_cluster_that_is_not_there() -> None:
    environment = {**os.environ, **ACCESS, "RAY_ADDRESS": "127.0.0.1:1"}
    done = run_command("--timeout", "3", module="mowe_ray.preflight", environment=environment, timeout_s=120)
    assert done.code == 1
    assert [check["name"] for check in done.result["checks"]] == ["cluster"]
    assert "RAY_ADDRESS" in done.result["checks"][0]["fix"]
