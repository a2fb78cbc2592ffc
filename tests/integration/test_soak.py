"""A hundred steps while something is killed, stopped or told to go every few seconds; prints what it cost.

Not part of the ordinary suite, for it takes minutes and never the same ones: `make soak` runs it.
"""

import time
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

from tests.faults import RunningCommand, ended
from tests.tiny_runs import Corpus, records

STEPS = 100
SETTINGS = (
    *("compute.num_workers=2", f"training.max_steps={STEPS}", "training.save_every=2", "training.log_samples=true"),
    *("training.step_timeout_s=20", "compute.zero_stage=2"),
)
FAULTS = ("kill worker", "stop worker", "terminate worker", "kill controller", "kill driver")

pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.timeout(3600)]


def test_a_hundred_steps_through_random_faults(tiny_corpus: Corpus, tmp_path: Path) -> None:
    random = np.random.default_rng()
    began, faults = time.monotonic(), []
    with ended(RunningCommand(tiny_corpus, tmp_path, "soak", *SETTINGS)) as command:
        while command.process.poll() is None:
            step = command.step()
            time.sleep(float(random.uniform(2, 8)))
            workers = command.actors("RayTrainWorker")
            if command.process.poll() is not None or not workers or command.step() == step:
                continue  # harm only what makes progress: a run that cannot take a step between two faults never ends
            fault = str(random.choice(FAULTS))
            faults.append((step, fault))
            _harm(command, fault, workers[int(random.integers(len(workers)))])
        finished = command.wait()
    seconds = time.monotonic() - began
    recoveries = [r["seconds"] for r in records(str(command.run), "recovery")]
    print(f"\n{len(faults)} faults in {seconds:.0f} s: {', '.join(f'{what} at {step}' for step, what in faults)}")
    print(f"{finished.err.count('continuing after step')} restarts, recoveries {np.round(recoveries, 1).tolist()} s")
    print(finished.result)
    assert finished.code == 0, finished.err
    assert finished.result["samples"] == {"lost": 0, "repeated": 0}
    assert [r["step"] for r in records(finished.result["run"], "train")] == list(range(1, STEPS + 1))


def _harm(command: RunningCommand, fault: str, worker: psutil.Process) -> None:
    controllers = command.actors("TrainController")
    try:
        if fault == "kill worker":
            worker.kill()
        elif fault == "stop worker":
            worker.suspend()
        elif fault == "terminate worker":
            worker.terminate()
        elif fault == "kill controller" and controllers:
            controllers[-1].kill()
        elif fault == "kill driver":
            command.driver().kill()
    except psutil.NoSuchProcess:
        return  # it was on its way out
