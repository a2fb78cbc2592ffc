"""A micro-batch that does not fit into memory is tried in two halves after a restart, and nothing is lost."""

import json
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from mowe_ray.config import RunConfig
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.training.datasets import index_sources
from mowe_ray.training.sampler import EpochSampler
from tests.end_to_end import tone_samples
from tests.faults import RunningCommand, ended
from tests.tiny_runs import Corpus, records, tiny_config

LONG = 12  # clips of 24 s, which make one micro-batch; its step needs some 300 MB
ROOM = 150 * 2**20  # far more than a step of short clips needs

SETTINGS = (
    *("compute.num_workers=2", "training.max_steps=10", "training.save_every=100", "training.log_samples=true"),
    *("data.max_duration_s=30", "data.batch_seconds=300", f"data.max_batch_size={LONG}", "compute.zero_stage=0"),
)

# A minute; real lacks of memory in a step are in tests/unit/training/fault_tolerance/test_out_of_memory.py, by default.
pytestmark = [pytest.mark.slow, pytest.mark.soak]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Many clips of one second, and as many long ones as go into a micro-batch."""
    folder = tmp_path_factory.mktemp("corpus")
    short, long = tone_samples(8 * LONG), tone_samples(LONG, first=1000, seconds=24.0)
    write_webdataset([*short, *long], str(folder / "train"))
    write_webdataset(tone_samples(4, first=2000), str(folder / "validation"))
    return Corpus(folder / "train", folder / "validation")


def _step_of_the_long_clips(config: RunConfig) -> int:
    index = index_sources(config.data).train
    order = EpochSampler(index, config.data, seed=config.seed, micro_batches_per_step=2, max_steps=10)
    durations = index.durations
    return next(
        p.step for p in order if any(len(rows) == LONG and durations[rows].min() > 20 for rows in p.micro_batches)
    )


def test_a_micro_batch_too_large_is_halved(corpus: Corpus, tmp_path: Path) -> None:
    # A seed whose first steps are short ones: there is time to take the memory away.
    seed = next(s for s in range(50) if _step_of_the_long_clips(_config(corpus, tmp_path, s)) >= 5)
    step = _step_of_the_long_clips(_config(corpus, tmp_path, seed))
    with ended(RunningCommand(corpus, tmp_path, "memory", *SETTINGS, f"seed={seed}")) as command:
        command.until_step(1)
        for worker in command.workers(2):
            worker.rlimit(psutil.RLIMIT_DATA, (worker.memory_info().data + ROOM,) * 2)
        finished = command.wait()
    assert finished.code == 0, finished.err
    assert f"out of memory at step {step} on {LONG} clips" in finished.err
    assert "trying it in two halves after a restart" in finished.err
    assert f"continuing after step {step - 1}" in finished.err, "the steps before were saved in time"
    assert finished.result["samples"] == {"lost": 0, "repeated": 0}
    assert [r["step"] for r in records(finished.result["run"], "train")] == list(range(1, 11))
    report = json.loads((command.run / "data_report.json").read_text())["out_of_memory"]
    assert sorted(report["split"]) == sorted(f"tone-{n}" for n in range(1000, 1000 + LONG))
    assert report["left_out"] == []


def _config(corpus: Corpus, storage: Path, seed: int) -> RunConfig:
    return tiny_config(corpus, storage, "memory", *SETTINGS, f"seed={seed}")
