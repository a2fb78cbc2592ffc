"""slurm.sh, run by bash with stand-ins for SLURM and Ray that write down how they were called."""

import os
import re
import secrets
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

SCRIPT = Path(__file__).parents[3] / "cluster" / "slurm.sh"

# Each call becomes a line of its arguments, one tab between two.
_CALLED = 'printf "%s" "$(basename "$0")" >> "$CALLS"; printf "\\t%s" "$@" >> "$CALLS"; echo >> "$CALLS"\n'
_STAND_INS = {
    # So many that who reads only the first line, and goes, would break the pipe.
    "scontrol": 'if [ "$1" = show ]; then seq -f node%.0f 7 20000; fi',
    "hostname": 'echo "10.0.0.7 172.17.0.1"',
    # Runs the command once, as on the first node; the pause is for the test of an early signal.
    "srun": """while [[ "$1" == --* ]]; do shift; done
        if [ "$1" = ray ]; then for _ in $(seq "${BEFORE_RAY:-0}"); do sleep 0.1; done; fi
        exec "$@" """,
    "ray": 'while [ "$1" != -- ]; do shift; done; shift; "$@"',
}
# What stands for a run: tells its surroundings, and on SIGTERM saves and ends as the project's commands do.
_RUN = """
trap 'touch "$FOLDER/saved"; exit 143' TERM
printf '%s\\n' "$RAY_ADDRESS" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" "$@" > "$FOLDER/told"
for _ in $(seq "$1"); do sleep 0.1; done
exit 3
"""


@pytest.fixture
def job(tmp_path):
    """Start slurm.sh as `sbatch --nodes=2 --gpus-per-node=4 cluster/slurm.sh RUN ARGUMENTS` would."""
    (tmp_path / "bin").mkdir()
    for name, body in _STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{_CALLED}{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "run.sh").write_text(_RUN)
    number = str(secrets.randbelow(10**9))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))},
        **{
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "FOLDER": str(tmp_path),
        },
        **{"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"},
        **{"SLURM_CPUS_PER_TASK": "32", "SLURM_GPUS_ON_NODE": "4"},
    }
    started = []

    def begin(*arguments, **changes):
        command = [str(SCRIPT), "bash", str(tmp_path / "run.sh"), *arguments] if arguments else [str(SCRIPT)]
        environment.update(changes)
        # Tests that run in the background ignore Ctrl-C, and bash cannot trap what it was started ignoring.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        started.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=heed))
        return started[-1]

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    Path(f"/tmp/mowe-{number}-0.pid").unlink(missing_ok=True)


def calls(folder, program):
    return [
        line.split("\t")[1:] for line in (folder / "calls").read_text().splitlines() if line.split("\t")[0] == program
    ]


def is_over(process):
    return process.info["status"] == psutil.STATUS_ZOMBIE


def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:  # it has just ended
        return None


def wait_for(process, condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_command_runs_on_all_nodes_and_its_exit_code_is_the_jobs(job, tmp_path):
    assert job("0", "name=two words").wait(60) == 3

    address, mode, token, *arguments = (tmp_path / "told").read_text().splitlines()
    assert (address, mode, arguments) == ("10.0.0.7:6379", "token", ["0", "name=two words"])
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert token not in (tmp_path / "calls").read_text()  # arguments can be read by every user of a node
    assert calls(tmp_path, "srun")[0] == [
        "--nodes=1",
        "--ntasks=1",
        "--nodelist=node7",
        "hostname",
        "--all-ip-addresses",
    ]
    assert calls(tmp_path, "srun")[1][:4] == ["--nodes=2", "--ntasks=2", "--cpus-per-task=32", "--kill-on-bad-exit=0"]
    assert calls(tmp_path, "scontrol") == [["show", "hostnames", "node[7-8]"]]


def test_ray_understands_what_it_is_told(job, tmp_path):
    job("0").wait(60)
    (call,) = calls(tmp_path, "ray")
    separator = call.index("--")
    assert call[0] == "symmetric-run"
    assert call[1:5] == ["--address", "10.0.0.7:6379", "--min-nodes", "2"]
    for_start = curate_and_validate_ray_start_args(call[1:separator])
    assert for_start == ["--num-cpus=32", "--num-gpus=4", "--disable-usage-stats"]
    options = start.make_context("start", list(for_start)).params  # raises for an option that `ray start` lacks
    assert (options["num_cpus"], options["num_gpus"], options["disable_usage_stats"]) == (32, 4, True)


@pytest.mark.slow
@pytest.mark.parametrize(("announced", "requeued"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_saves_and_only_the_time_limit_requeues(job, tmp_path, announced, requeued):
    process = job("300")
    wait_for(process, (tmp_path / "told").exists)
    process.send_signal(announced)
    assert process.wait(30) == 143
    assert (tmp_path / "saved").exists()
    asked = [call for call in calls(tmp_path, "scontrol") if call[0] == "requeue"]
    assert len(asked) == requeued
    overlapping = calls(tmp_path, "srun")[2]
    assert overlapping[:4] == ["--overlap", "--nodes=1", "--ntasks=1", "--nodelist=node7"]


@pytest.mark.slow
def test_a_second_signal_does_not_end_the_job_before_the_run_has_saved(job, tmp_path):
    (tmp_path / "run.sh").write_text(_RUN.replace("trap '", "trap 'sleep 2; "))
    process = job("300")
    wait_for(process, (tmp_path / "told").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_signal_before_the_run_has_started_ends_the_job_and_all_of_it(job, tmp_path):
    process = job("300", BEFORE_RAY="200")
    wait_for(process, lambda: (tmp_path / "calls").exists() and len(calls(tmp_path, "srun")) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    deadline = time.monotonic() + 30
    while left := [p for p in psutil.process_iter(["status"]) if group_of(p.pid) == process.pid and not is_over(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert not (tmp_path / "told").exists()


@pytest.mark.slow
def test_without_a_command_it_says_how_to_use_it(job):
    assert job().wait(30) == 2
