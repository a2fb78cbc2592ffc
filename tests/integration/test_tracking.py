"""A run whose worker and driver are killed and that is stopped: one history in every tracker, and in Prometheus."""

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import ROOT
from tests.faults import RunningCommand
from tests.tiny_runs import Corpus
from tests.trackers import tensorboard_of, wandb_history

pytestmark = pytest.mark.soak

DASHBOARD = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


@dataclass(frozen=True)
class Tracked:
    """What the run left, how it ended, and how many series each query of the dashboard found while it ran."""

    run: Path
    code: int
    said: str
    last: int
    series: dict[str, int]


@pytest.fixture(scope="module")
def tracked(tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    storage = tmp_path_factory.mktemp("tracked")
    temp = Path(subprocess.check_output(["mktemp", "-d", "/tmp/mt.XXXX"], text=True).strip())  # sockets: a short path
    overrides = ["training.max_steps=100000", "training.save_every=5", "training.eval_every=15"]
    overrides += ["tracking.tensorboard=true", "tracking.wandb.mode=offline", "compute.num_workers=1"]
    environment = {"RAY_TMPDIR": str(temp), "RAY_metrics_report_interval_ms": "1000"}
    command = RunningCommand(tiny_corpus, storage, "tracked", *overrides, **environment)
    try:
        command.until_step(17)
        command.workers()[0].kill()
        command.until(lambda: "recovered in" in command.said, "recovery")
        command.until_step(command.step() + 3)
        with prometheus(temp / "ray" / "prom_metrics_service_discovery.json") as ask:
            series = answers(ask, command)
        command.driver().kill()
        before = command.step()
        command.until(lambda: command.said.count("continuing after step") >= 2, "second restart")
        command.until(lambda: command.step() > before + 2, "steps after it")
        command.process.send_signal(signal.SIGINT)
        finished = command.wait()
    finally:
        command.process.kill()
        shutil.rmtree(temp, ignore_errors=True)
    return Tracked(command.run, finished.code, finished.err, finished.result["stopped_at_step"], series)


@contextmanager
def prometheus(targets: Path) -> Iterator[str]:
    """Run a Prometheus that scrapes the nodes that Ray names; yields the address to ask."""
    program = shutil.which("prometheus") or pytest.skip("needs Debian's package prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = targets.parent / "prometheus"
    folder.mkdir()
    config = {
        "global": {"scrape_interval": "4s"},
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    options = [f"--storage.tsdb.path={folder}/data", f"--config.file={folder}/prometheus.yml"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, *options, f"--web.listen-address={address}"], stderr=log, stdout=log)
    try:
        yield f"http://{address}/api/v1/query"
    finally:
        process.kill()
        process.wait()


def answers(address: str, command: RunningCommand) -> dict[str, int]:
    """Ask every query of the dashboard until all find something; returns how many series each has found."""
    found: dict[str, int] = dict.fromkeys(QUERIES, 0)
    deadline = time.monotonic() + 120
    while not all(found.values()) and time.monotonic() < deadline and command.process.poll() is None:
        time.sleep(2)
        for query in found:
            asked = urllib.parse.urlencode({"query": query.replace("$run", "tracked")})
            with suppress(OSError), urllib.request.urlopen(f"{address}?{asked}") as answer:
                found[query] = max(found[query], len(json.load(answer)["data"]["result"]))
    return found


def test_no_step_is_missing_or_doubled(tracked: Tracked) -> None:
    lines = [json.loads(line) for line in (tracked.run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, tracked.last + 1))
    board = tensorboard_of(tracked.run)
    assert [step for step, _ in board["train/loss"]] == steps
    assert [value for _, value in board["train/loss"]] == pytest.approx(
        [r["loss"] for r in lines if r["kind"] == "train"]
    )
    rows = wandb_history(tracked.run)
    assert [row["train/step"] for row in rows if "train/loss" in row] == steps
    validated = [line["step"] for line in lines if line["kind"] == "validation"]
    assert validated == list(range(15, tracked.last, 15))
    tasks: dict[str, Any] = next(line["tasks"] for line in lines if line["kind"] == "validation")
    for task in tasks:
        assert [step for step, _ in board[f"validation/held_out/{task}/score"]] == validated
    scored = [row["validation/held_out/step"] for row in rows if "validation/held_out/loss" in row]
    assert scored == validated


def test_the_terminal_says_how_to_go_on(tracked: Tracked) -> None:
    assert tracked.code == 130
    assert f"\nstopped at step {tracked.last}; to go on: python -m mowe_ray.train " in tracked.said
    stamped = [line for line in tracked.said.splitlines() if "  loss " in line]
    assert len(stamped) > 10
    assert max(map(len, stamped)) <= 80
    for label in ("run", "data", "workers", "dashboard", "tracking", "model"):
        assert f" {label:<10} " in tracked.said, label
    assert "ray_remote_args_fn" not in tracked.said


def test_every_query_of_the_dashboard_has_data(tracked: Tracked) -> None:
    assert {query: count for query, count in tracked.series.items() if not count} == {}
