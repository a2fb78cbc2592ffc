"""Disks and shared memory."""

import shutil
import tempfile
from pathlib import Path

from mowe_ray.config import load_config
from mowe_ray.distributed.preflight.requirements import (
    SCRATCH,
    SHARED_MEMORY,
    Space,
    judge_shared_memory,
    judge_space,
    judge_spilling,
    measure,
    needs_of,
)
from mowe_ray.training.build import assemble
from tests.tiny_models import tiny_tokenizer
from tests.tiny_runs import TINY

MIB = 1 << 20


def test_folders_that_are_still_to_be_made_are_measured_where_they_will_be(tmp_path: Path) -> None:
    found = measure({"storage": str(tmp_path / "runs" / "mine")})
    assert found["storage"].folder == str(tmp_path / "runs" / "mine")
    assert found["storage"].total == shutil.disk_usage(tmp_path).total
    assert found[SCRATCH].folder == tempfile.gettempdir()
    assert found[SHARED_MEMORY].total == shutil.disk_usage("/dev/shm").total


def test_a_disk_that_is_too_small_for_the_run(small_disk: Path) -> None:
    found = {"a": measure({"storage": str(small_disk)}), "b": measure({"storage": "/"})}
    assert judge_space({"storage": 1 * MIB}, found) == []
    (finding,) = judge_space({"storage": 3 * MIB}, found)
    assert finding.status == "failed"
    assert f"2.0 MiB free in {small_disk} on a, and the run needs 3.0 MiB" in finding.detail


def test_a_disk_that_ray_takes_for_full(small_disk: Path) -> None:
    assert judge_spilling("Ray's folder", {"a": measure({"Ray's folder": str(small_disk)})}) == []
    (small_disk / "filler").write_bytes(bytes(round(1.95 * MIB)))
    (finding,) = judge_spilling("Ray's folder", {"a": measure({"Ray's folder": str(small_disk)})})
    assert finding.status == "failed"
    assert "more than 95% full on a" in finding.detail


def test_shared_memory() -> None:
    docker = {SHARED_MEMORY: Space("/dev/shm", 64 * MIB, 64 * MIB)}
    roomy = {SHARED_MEMORY: Space("/dev/shm", 4096 * MIB, 8192 * MIB)}
    assert judge_shared_memory({"a": roomy}, {"a": 4096.0 * MIB}) == []
    (finding,) = judge_shared_memory({"a": docker, "b": roomy}, {"a": 1024.0 * MIB, "b": 1024.0 * MIB})
    assert finding.status == "warning"
    assert finding.detail.startswith("a: the object store (1.00 GiB) does not fit /dev/shm (64.0 MiB)")
    (finding,) = judge_shared_memory({"a": docker}, {"a": 32.0 * MIB})
    assert "64.0 MiB of /dev/shm are free" in finding.detail


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
