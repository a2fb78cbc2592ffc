"""What happens to a run when the world around it breaks: every fault here is caused for real, in real processes.

Some of them for minutes: `make soak` runs those.
"""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from mowe_ray.distributed.ray_train.driver import train
from mowe_ray.output.run_folder import RunFolder
from tests import deadly_decoder
from tests.deadly_decoder.sitecustomize import HANGS
from tests.end_to_end import ROOT, tone_samples
from tests.faults import RunningCommand, ended, fill
from tests.tiny_runs import REFERENCE, Corpus, assert_same_run, records, tiny_config

STEPS = 16

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.soak  # a closed terminal takes the same way: test_one_driver.py
def test_sigterm_saves_and_the_same_command_continues(
    tiny_corpus: Corpus, storage: Path, reference: dict[str, Any]
) -> None:
    with ended(RunningCommand(tiny_corpus, storage, "terminated", *REFERENCE)) as command:
        command.until_step(6)
        workers = command.workers(2)
        command.process.send_signal(signal.SIGTERM)
        stopped = command.wait(60)
    step = stopped.result["stopped_at_step"]
    assert stopped.code == 128 + signal.SIGTERM
    assert 6 <= step < STEPS
    assert command.checkpoints()[-1] == step, "no step that was trained is lost"
    assert not any(worker.is_running() for worker in workers)
    assert not (command.run / "result.json").exists()
    with ended(RunningCommand(tiny_corpus, storage, "terminated", *REFERENCE)) as command:
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert f"continuing after step {step}" in finished.err
    assert_same_run(finished.result, reference)


@pytest.mark.soak
def test_a_worker_told_to_go_saves_first(tiny_corpus: Corpus, storage: Path, reference: dict[str, Any]) -> None:
    settings = (*REFERENCE, "training.save_every=100")
    with ended(RunningCommand(tiny_corpus, storage, "worker_terminated", *settings)) as command:
        command.until_step(6)
        worker = command.workers(2)[1]
        worker.terminate()
        command.until(command.checkpoints, "checkpoint before the worker goes")
        finished = command.wait()
    assert finished.code == 0, finished.err
    step = int(finished.err.partition("continuing after step ")[2].partition(",")[0])
    assert step >= 6, "without the signal there would have been no checkpoint"
    assert_same_run(finished.result, reference)


@pytest.mark.soak
def test_a_killed_controller_is_replaced(tiny_corpus: Corpus, storage: Path, reference: dict[str, Any]) -> None:
    with ended(RunningCommand(tiny_corpus, storage, "no_controller", *REFERENCE)) as command:
        command.until_step(6)
        (controller,) = command.actors("TrainController")
        controller.kill()
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "the training controller died" in finished.err
    assert_same_run(finished.result, reference)


@pytest.mark.soak
def test_a_lost_head_is_survived(tiny_corpus: Corpus, storage: Path, reference: dict[str, Any]) -> None:
    # Ray gives a head a minute to come back before it ends everything; here it is not to.
    impatient = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
    with ended(RunningCommand(tiny_corpus, storage, "no_head", *REFERENCE, **impatient)) as command:
        command.until_step(6)
        (head,) = [p for p in psutil.Process(command.process.pid).children(recursive=True) if p.name() == "gcs_server"]
        head.kill()
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "the driver died" in finished.err
    assert_same_run(finished.result, reference)


@pytest.mark.soak
def test_a_stopped_rank_is_told_and_replaced(tiny_corpus: Corpus, storage: Path, reference: dict[str, Any]) -> None:
    settings = (*REFERENCE, "training.step_timeout_s=15")
    with ended(RunningCommand(tiny_corpus, storage, "frozen_rank", *settings)) as command:
        command.until_step(6)
        frozen = command.workers(2)[1]
        frozen.suspend()  # it lives, and answers nobody
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "(training.step_timeout_s): rank" in finished.err
    assert "could not save" in finished.err, "the frozen rank has its part of the weights"
    assert not frozen.is_running()
    (stacks,) = (command.run / "hangs").iterdir()
    assert "all_reduce" in stacks.read_text()
    assert_same_run(finished.result, reference)


@pytest.mark.soak  # two minutes, most of it the watchdog's patience
def test_a_read_that_never_ends_is_told_and_nothing_is_lost(tiny_corpus: Corpus, storage: Path) -> None:
    manifest, clips = _write_manifest(storage / "clips", 20)
    settings = (
        *("compute.num_workers=2", "training.save_every=100", "training.log_samples=true"),
        *(f"data.train=[{{path: {manifest}}}]", "data.max_batch_size=1", "training.step_timeout_s=15"),
    )
    train(tiny_config(tiny_corpus, storage, "pipe", *settings, "training.max_steps=1"), [].append)  # scans the clips
    whole = clips[7].read_bytes()
    clips[7].write_bytes(whole + HANGS)  # a file server that has stopped to answer
    environment = {"PYTHONPATH": f"{next(iter(deadly_decoder.__path__))}:{ROOT}"}
    with ended(
        RunningCommand(tiny_corpus, storage, "pipe", *settings, "training.max_steps=12", **environment)
    ) as command:
        command.until(lambda: "is at: waiting for data" in command.said, "alarm")
        clips[7].write_bytes(whole)
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "saved the step before" in finished.err
    assert finished.result["samples"] == {"lost": 0, "repeated": 0}
    assert [r["step"] for r in records(finished.result["run"], "train")] == list(range(1, 13))


def _write_manifest(folder: Path, count: int) -> tuple[Path, list[Path]]:
    """Write tones as single files, and a manifest of them."""
    folder.mkdir()
    clips = []
    for sample in tone_samples(count):
        clips.append(folder / f"{sample.id}.flac")
        clips[-1].write_bytes(sample.audio or b"")
        fields = {"instruction": sample.instruction, "answer": sample.answer, "task": sample.task}
        with (folder / "tones.jsonl").open("a") as manifest:
            manifest.write(json.dumps({"audio": str(clips[-1]), **fields}) + "\n")
    return folder / "tones.jsonl", clips


@pytest.mark.soak  # a minute
def test_a_full_disk_costs_checkpoints_but_not_the_run(
    tiny_corpus: Corpus, disk: Path, reference: dict[str, Any]
) -> None:
    with ended(RunningCommand(tiny_corpus, disk, "full", *REFERENCE)) as command:
        command.until(lambda: 4 in command.checkpoints(), "first checkpoint")
        ballast = disk / "ballast"
        fill(ballast)
        command.until(lambda: "failed: No space left on device" in command.said, "warning")
        assert 4 in command.checkpoints(), "the one before stays"
        ballast.unlink()
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert [r["step"] for r in records(finished.result["run"], "train")] == list(range(1, STEPS + 1))
    assert_same_run(finished.result, reference)


@pytest.mark.soak
def test_a_disk_that_stays_full_ends_the_run_clearly_and_the_last_checkpoint_loads(
    tiny_corpus: Corpus, disk: Path, reference: dict[str, Any]
) -> None:
    with ended(RunningCommand(tiny_corpus, disk, "full", *REFERENCE)) as command:
        command.until(lambda: 4 in command.checkpoints(), "first checkpoint")
        fill(disk / "ballast")
        finished = command.wait()
    assert finished.code == 1
    assert "No space left on device" in finished.result["error"]
    assert "storage" in finished.result["error"]
    (disk / "ballast").unlink()
    with ended(RunningCommand(tiny_corpus, disk, "full", *REFERENCE)) as command:
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "continuing after step" in finished.err
    assert_same_run(finished.result, reference)


@pytest.mark.soak
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tiny_corpus: Corpus, storage: Path, reference: dict[str, Any]
) -> None:
    first = train(tiny_config(tiny_corpus, storage, "damaged", *REFERENCE, "training.max_steps=8"), [].append)
    folder = Path(first["run"]) / "checkpoints"
    weights = next((folder / "step-00000008").glob("rank-00001-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])  # half-copied
    said: list[str] = []
    result = train(tiny_config(tiny_corpus, storage, "damaged", *REFERENCE), said.append)
    assert any("step-00000008 is not used" in line for line in said)
    assert any("continuing after step 4" in line for line in said)
    assert_same_run(result, reference)
    assert RunFolder(str(storage), "damaged").exists("result.json")


# Preloaded into every process of a command: the time of day jumps once a file is there. Clocks that only measure, as
# CLOCK_MONOTONIC, go on: a machine whose clock is set has them too.
CLOCK = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) {
    const char *file = getenv("CLOCK_JUMP_FILE"), *by = getenv("CLOCK_JUMP_S");
    return file && by && syscall(SYS_access, file, F_OK) == 0 ? atol(by) : 0;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}
"""


@pytest.mark.soak
@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_clock_that_jumps_by_an_hour_changes_nothing(
    jump_s: int, tiny_corpus: Corpus, tmp_path: Path, reference: dict[str, Any]
) -> None:
    (tmp_path / "clock.c").write_text(CLOCK)
    compiled = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "clock.so"), str(tmp_path / "clock.c")]
    if shutil.which("cc") is None or subprocess.run(compiled, check=False).returncode:
        pytest.skip("no C compiler")
    jump = tmp_path / "jump"
    clock = {"LD_PRELOAD": str(tmp_path / "clock.so"), "CLOCK_JUMP_FILE": str(jump), "CLOCK_JUMP_S": str(jump_s)}
    with ended(RunningCommand(tiny_corpus, tmp_path, "jumping", *REFERENCE, **clock)) as command:
        command.until_step(6)
        jump.touch()
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert "continuing after step" not in finished.err
    assert_same_run(finished.result, reference)
