"""Small studies: a sweep file around the tiny run, and what is left of one in its folder."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mowe_ray.sweeping.trials import Trial, load_all
from mowe_ray.training.run_folder import RunFolder
from tests.tiny_runs import TINY, Corpus


def write_sweep(folder: Path, corpus: Corpus, **keys: Any) -> Path:
    """Write the sweep file of a study of tiny runs; `keys` are added, `set` on top of what makes them tiny."""
    tiny = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in TINY)}
    tiny |= {
        "training.max_steps": 12,
        "training.eval_every": 4,
        "data.train": [{"path": str(corpus.train)}],
        "data.validation": [{"path": str(corpus.validation), "name": "held_out"}],
    }
    tree = {"name": "study", "question": "Which is best?", "storage": str(folder / "runs"), "base": "quickstart"}
    tree |= keys | {"set": tiny | keys.get("set", {})}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(sweep: Path, *overrides: str, log: Path) -> subprocess.Popen[str]:
    """Start the command as a user would, in a process group of its own."""
    with log.open("a") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "mowe_ray.sweep", str(sweep), *overrides],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )


def run(sweep: Path, *overrides: str, log: Path, timeout_s: float = 800) -> tuple[int, dict[str, Any]]:
    """Run the command to its end; returns its exit code and the result in the last line."""
    process = start(sweep, *overrides, log=log)
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"no end within {timeout_s:g} s:\n{log.read_text()[-4000:]}") from None
    assert out, log.read_text()[-4000:]
    return process.returncode, json.loads(out.splitlines()[-1])


def end(process: subprocess.Popen[str]) -> None:
    """Kill the command, with its supervisor, and wait until its Ray is gone too."""
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in listed.split()]


def trials(storage: Path, name: str = "study") -> list[Trial]:
    """Return the trials in the study's folder."""
    return load_all(RunFolder(str(storage), name))


def wait_until(condition: Callable[[], object], timeout_s: float = 400) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.3)
