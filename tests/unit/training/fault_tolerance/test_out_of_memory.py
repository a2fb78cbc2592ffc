import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from mowe_ray.data.data_report import DataReport
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.collate import Batch
from mowe_ray.training.fault_tolerance.out_of_memory import (
    MicroBatchOutOfMemory,
    OutOfMemoryRecords,
    annotate_out_of_memory,
    is_out_of_memory,
    record,
)
from mowe_ray.training.sampler import rows_of_rank
from tests.made_index import made_index


def batch(rows) -> Batch:
    ids = [f"s{row}" for row in rows]
    return Batch({}, 0, len(rows), 2.0 * len(rows), 2.0 * len(rows), ids, [], [], [], [], [])


def lanes(*rows) -> list[np.ndarray]:
    return [np.asarray(lane, np.int64) for lane in rows]


def lists(arrays) -> list[list[int]]:
    assert all(array.dtype == np.int64 for array in arrays)
    return [array.tolist() for array in arrays]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(str(tmp_path), "run")


def fail(folder: RunFolder, rows, *, step: int = 12, lane: int = 0, rank: int = 0) -> str:
    """Write down that `rows` did not fit; returns the line for a person."""
    error = MicroBatchOutOfMemory(step, lane, batch(rows))
    before = OutOfMemoryRecords.load(folder)
    return before.line(record(folder, error, rank=rank, rows=np.asarray(rows, np.int64)))


STEP = lanes([1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11])


def test_without_records_the_plan_stays(folder):
    records = OutOfMemoryRecords.load(folder)
    assert lists(records.apply(STEP)) == lists(STEP)
    assert records.report() == {"split": [], "left_out": []}
    assert records.warning() is None


def test_records_of_rows_that_are_other_samples_now_are_passed_over(folder):
    for shard in ("s", "other"):
        index = made_index([("a", shard, 12)])
        error = MicroBatchOutOfMemory(12, 2, replace(batch([8]), ids=["s/8"]))
        record(folder, error, rank=0, rows=np.asarray([8]))
        expected = [[], [1]] if shard == "s" else [[8], [1]]
        assert lists(OutOfMemoryRecords.load(folder, index).apply(lanes([8], [1]))) == expected
    assert lists(OutOfMemoryRecords.load(folder, made_index([("a", "s", 8)])).apply(lanes([8], [1]))) == [[8], [1]]


def test_once_is_tried_in_halves_on_an_extra_lane(folder):
    line = fail(folder, [1, 2, 3, 4, 5], lane=0, rank=0)
    assert line == (
        "out of memory at step 12 on 5 clips, 10 s (rank 0): trying it in two halves after a restart; "
        "if this repeats, lower data.batch_seconds or run --find-batch"
    )
    records = OutOfMemoryRecords.load(folder)
    assert lists(records.apply(STEP)) == [[1, 2, 3], [6, 7], [8], [9, 10, 11], [4, 5]]
    assert records.report() == {"split": ["s1", "s2", "s3", "s4", "s5"], "left_out": []}
    assert records.warning().startswith("memory did not suffice before: 5 samples are tried in smaller micro-batches")


def test_several_splits_share_the_extra_lanes(folder):
    fail(folder, [1, 2, 3, 4, 5], lane=0)
    fail(folder, [6, 7], lane=1)
    fail(folder, [9, 10, 11], lane=3)
    tried = OutOfMemoryRecords.load(folder).apply(STEP)
    assert lists(tried) == [[1, 2, 3], [6], [8], [9, 10], [4, 5], [7], [11]]
    assert [lists(rows_of_rank(tried, rank, 2)) for rank in (0, 1)] == [
        [[1, 2, 3], [8], [4, 5], [11]],
        [[6], [9, 10], [7], []],
    ], "equally many on every rank"


def test_order_of_the_rows_matters_and_other_steps_are_left_alone(folder):
    fail(folder, [6, 7])
    records = OutOfMemoryRecords.load(folder)
    other = lanes([7, 6], [6, 7, 8], [], [1])
    assert lists(records.apply(other)) == lists(other)


@pytest.mark.parametrize("again", [[1, 2, 3, 4, 5], [1, 2, 3], [4, 5]])
def test_twice_is_left_out_whole_and_named(folder, again):
    fail(folder, [1, 2, 3, 4, 5])
    line = fail(folder, again, lane=0 if len(again) != 2 else 4)
    assert ("with its other half" in line) == (len(again) < 5)
    assert "it is left out" in line
    records = OutOfMemoryRecords.load(folder)
    assert len(records.events) == 2
    assert lists(records.apply(STEP)) == [[], [6, 7], [8], [9, 10, 11]]
    assert records.report() == {"split": [], "left_out": ["s1", "s2", "s3", "s4", "s5"]}


def test_a_single_sample_is_left_out_at_once(folder):
    assert "1 clip, 2 s (rank 0): it is left out after a restart" in fail(folder, [8])
    records = OutOfMemoryRecords.load(folder)
    assert lists(records.apply(STEP)) == [[1, 2, 3, 4, 5], [6, 7], [], [9, 10, 11]]
    assert records.report() == {"split": [], "left_out": ["s8"]}


def test_an_empty_micro_batch_is_never_split(folder):
    fail(folder, [])
    assert lists(OutOfMemoryRecords.load(folder).apply(lanes([], [1]))) == [[], [1]]


def test_each_event_has_a_file_of_its_own(folder):
    for lane, rank in ((2, 0), (3, 1), (3, 1)):
        fail(folder, [lane, 20], lane=lane, rank=rank)
    fail(folder, [1, 2], step=7, lane=3, rank=1)
    names = [f"step-{name}.json" for name in ("12-lane-2", "12-lane-3-2", "12-lane-3", "7-lane-3")]
    assert folder.names("out_of_memory") == names
    assert json.loads(folder.read_text(f"out_of_memory/{names[2]}")) == {
        "step": 12,
        "lane": 3,
        "rank": 1,
        "rows": [3, 20],
        "ids": ["s3", "s20"],
        "audio_s": 4.0,
    }
    assert [(e.step, e.lane) for e in OutOfMemoryRecords.load(folder).events] == [(7, 3), (12, 2), (12, 3), (12, 3)]


def test_the_records_are_read_from_any_file_system():
    folder = RunFolder("memory://records", "run")
    fail(folder, [1, 2])
    fail(folder, [1, 2])
    assert folder.names("out_of_memory") == [f"step-12-lane-0{n}.json" for n in ("-2", "")]
    assert len(OutOfMemoryRecords.load(folder).events) == 2


def test_the_data_report_names_them():
    report = DataReport({"made": 10})
    assert "out_of_memory" not in report.to_json()
    report.set_out_of_memory(split=["a"], left_out=["b", "c"])
    assert report.to_json()["out_of_memory"] == {"split": ["a"], "left_out": ["b", "c"]}
    assert report.to_json()["bad"] == 0


def test_naming_says_which_micro_batch_it_was_and_lets_other_errors_pass():
    with (
        pytest.raises(MicroBatchOutOfMemory, match="out of memory at step 3 on 2 clips, 4 s") as caught,
        annotate_out_of_memory(3, 5, batch([1, 2])),
    ):
        np.empty(1 << 50, np.int8)
    assert (caught.value.step, caught.value.slot, caught.value.ids) == (3, 5, ["s1", "s2"])
    assert isinstance(caught.value.__cause__, MemoryError)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError, match="shapes"), annotate_out_of_memory(3, 5, batch([1])):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(KeyError), annotate_out_of_memory(3, 5, batch([1])):
        {}["x"]


def test_which_errors_are_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(1 << 50)
    assert is_out_of_memory(too_large.value)
    for wrong in (
        lambda: torch.ones(2, 3) @ torch.ones(2, 3),
        lambda: torch.ones(2).backward(),
        lambda: torch.nn.Conv1d(4, 4, 3)(torch.ones(1, 3, 8)),
        lambda: torch.empty(-1),
    ):
        with pytest.raises(RuntimeError) as other:
            wrong()
        assert not is_out_of_memory(other.value), other.value


_CHILD = """
import json, os, resource, sys
import numpy as np
from mowe_ray.training.collate import collate
from mowe_ray.training.loop import training_steps
from mowe_ray.training.fault_tolerance.out_of_memory import is_out_of_memory
from tests.ranks import make_model, merged, micro_batch, plain_engine

model, processor = make_model(whole=True)
engine = plain_engine(model)
def step(number):
    batch = collate(merged([micro_batch([n % 5], seed=n) for n in range(number)]), processor)
    next(training_steps(engine, [(1, 1.0, [batch])], seed=0))
step(2)  # everything that is allocated once
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
for clips, room_mib in json.loads(sys.argv[1]):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    limit = used + room_mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        step(clips)
    except Exception as error:
        verdict = is_out_of_memory(error)
        print(type(error).__name__, str(error)[:200].replace(chr(10), " "), verdict, sep="|", flush=True)
    else:
        print("fits", flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_a_training_step_that_really_runs_out_of_memory():
    """In processes that are forked after the imports, which take longer than all steps."""
    cases = [(2, 400), (200, 400), (200, 100)]  # clips, MiB that are left
    command = [sys.executable, "-c", _CHILD, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fits, *others = done.stdout.splitlines()[-3:]
    assert fits == "fits"
    assert [line.rpartition("|")[2] for line in others] == ["True", "True"], others
