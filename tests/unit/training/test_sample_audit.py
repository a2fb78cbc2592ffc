import json
from collections.abc import Callable

import pytest

from mowe_ray.data.sample import BadSample
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.collate import Batch
from mowe_ray.training.protocols import Ranks
from mowe_ray.training.sample_audit import SampleAuditLog, audit_samples
from tests.made_index import made_index
from tests.thread_ranks import on_ranks, thread_ranks

INDEX = made_index([("a", "x", 4), ("b", "y", 10)])
WEIGHTS = (2.0, 1.3)


def batch(*ids: str, bad: str | None = None) -> Batch:
    found = [BadSample(bad, "made", "silent")] if bad else []
    return Batch({}, 0, 0, 0.0, 0.0, list(ids), ["made"] * len(ids), [], [], [], found)


def lines_of(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.read_text("samples.jsonl").splitlines()]


def test_a_line_has_the_samples_of_all_ranks_good_and_bad(tmp_path):
    folder = RunFolder(str(tmp_path), "run")

    def run(ranks: Ranks) -> None:
        log = SampleAuditLog(ranks, folder, resume_step=0)
        log.add(1, 0, [batch(f"{ranks.rank}a", bad=f"{ranks.rank}b"), batch()])
        log.add(2, 1, [batch(f"{ranks.rank}c")])
        if ranks.rank == 0:
            assert lines_of(folder) == []
        log.flush()
        log.flush()

    on_ranks(2, run)
    assert lines_of(folder) == [
        {"step": 1, "epoch": 0, "samples": [["made", name] for name in ("0a", "0b", "1a", "1b")]},
        {"step": 2, "epoch": 1, "samples": [["made", "0c"], ["made", "1c"]]},
    ]


def test_a_resumed_log_goes_on_after_its_checkpoint(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    (ranks,) = thread_ranks(1)
    log = SampleAuditLog(ranks, folder, resume_step=0)
    for step in (1, 2, 3):
        log.add(step, 0, [batch(f"first{step}")])
    log.flush()
    folder.append_text("samples.jsonl", '{"step": 4, "ep')
    log.add(4, 0, [batch("lost with the process")])
    resumed = SampleAuditLog(ranks, folder, resume_step=2)
    resumed.add(3, 0, [batch("second3")])
    resumed.flush()
    assert [line["samples"][0][1] for line in lines_of(folder)] == ["first1", "first2", "second3"]


def test_much_is_written_without_being_asked(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    log = SampleAuditLog(thread_ranks(1)[0], folder, resume_step=0)
    for step in range(1, 40):
        log.add(step, 0, [batch(*(f"{step}-{n:030d}" for n in range(1000)))])
    assert len(lines_of(folder)) > 20


def epoch(number: int, extra: range) -> list[dict]:
    """Lines of a right epoch: a twice, b once and three of its ten samples once more."""
    a = [["a", f"x/{n}"] for n in range(4)]
    b = [["b", f"y/{n}"] for n in [*range(10), *extra]]
    samples = [*a, *b[:5], *b[5:], *a]
    return [{"step": n + 1, "epoch": number, "samples": samples[4 * n : 4 * n + 4]} for n in range(6)]


def check(lines: list[dict], epochs: int) -> tuple[int, int, list[str]]:
    result = audit_samples(INDEX, WEIGHTS, map(json.dumps, lines), epochs)
    assert result.epochs == epochs
    return result.lost, result.repeated, result.findings


def without(lines: list[dict], name: str) -> None:
    """Take one occurrence of a sample out."""
    line = next(line for line in lines if name in [id_ for _, id_ in line["samples"]])
    line["samples"].remove(next(sample for sample in line["samples"] if sample[1] == name))


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (lambda lines: None, (0, 0, [])),
        (lambda lines: without(lines, "x/2"), (1, 0, ["epoch 0, a: lost x/2"])),
        (lambda lines: without(lines, "y/9"), (1, 0, ["epoch 0, b: lost y/9"])),
        (lambda lines: without(lines, "y/1"), (1, 0, ["epoch 0, b: 1 of 3 extra turns lost"])),
        (lambda lines: lines[3]["samples"].append(["a", "x/2"]), (0, 1, ["epoch 0, a: repeated x/2"])),
        (lambda lines: lines[3]["samples"].append(["b", "y/9"]), (0, 1, ["epoch 0, b: 1 extra turns more than 3"])),
        (lambda lines: lines[3]["samples"].append(["b", "y/0"]), (0, 1, ["epoch 0, b: repeated y/0"])),
        (lambda lines: lines.pop(0), (4, 0, ["epoch 0, a: lost x/0, x/1, x/2, x/3"])),
        (lambda lines: lines.append(lines[0]), (0, 4, ["epoch 0, a: repeated x/0, x/1, x/2, x/3"])),
        (lambda lines: lines[3]["samples"].append(["a", "gone/0"]), (0, 0, [])),
        (lambda lines: lines[3]["samples"].append(["a", "y/9"]), (0, 0, [])),
    ],
)
def test_what_was_planted_is_found(plant: Callable, found):
    lines = epoch(0, range(3)) + epoch(1, range(3, 6))
    plant(lines)
    assert check(lines, 2) == found


def test_an_unfinished_epoch_is_checked_for_repeats_only():
    lines = epoch(0, range(3)) + epoch(1, range(3, 6))[:3]
    assert check(lines, 1) == (0, 0, [])
    assert check(lines, 2)[0] > 0
    lines[-1]["samples"] += [["a", "x/1"]] * 2
    assert check(lines, 1) == (0, 1, ["epoch 1, a: repeated x/1"])


def test_a_corpus_that_moves_and_grows_loses_nothing_that_it_did_not_have():
    index = made_index([("train0:/new", "x", 4), ("train1:/b", "y", 10)])
    old = {"a": "train0:/old", "b": "train1:/b"}
    first, second = epoch(0, range(3)), epoch(1, range(3, 6))
    lines = [
        {**line, "samples": [[old[s], i] for s, i in line["samples"] if line["epoch"] or i not in ("x/3", "y/9")]}
        for line in first + second
    ]

    def lost(*more: dict) -> tuple[int, int]:
        result = audit_samples(index, WEIGHTS, map(json.dumps, [*lines[:6], *more, *lines[6:]]), 2)
        return result.lost, result.repeated

    added = {"step": 6, "epoch": 1, "samples": [], "new": [["train0:/new", "x/3"], ["train1:/b", "y/9"]]}
    assert lost() == (3, 0)
    assert lost(added) == (0, 0)
    without(lines[6:], "x/3")
    assert lost(added) == (1, 0), "from then on it counts"
    lines[7]["samples"] += [[old["b"], "y/9"]] * 3
    assert lost(added) == (1, 2)


def test_the_log_notes_which_samples_are_new(tmp_path):
    folder = RunFolder(str(tmp_path), "run")
    log = SampleAuditLog(thread_ranks(1)[0], folder, resume_step=0)
    log.data_changed(7, 2, INDEX, [1, 4])
    log.flush()
    assert lines_of(folder) == [{"step": 7, "epoch": 2, "samples": [], "new": [["a", "x/1"], ["b", "y/0"]]}]


def test_an_epoch_without_a_line_is_lost():
    assert check(epoch(0, range(3)), 2)[0] == 8 + 10 + 3
    assert check([], 0) == (0, 0, [])


def test_the_check_in_a_line():
    lines = epoch(0, range(3)) + epoch(1, range(3, 6))
    weights = WEIGHTS
    assert str(audit_samples(INDEX, weights, map(json.dumps, lines), 2)) == "samples: 2 epochs, 0 lost, 0 repeated"
    without(lines, "y/8")
    told = str(audit_samples(INDEX, weights, map(json.dumps, lines), 1))
    assert told == "samples: 1 epoch, 1 lost, 0 repeated\n  epoch 0, b: lost y/8"
    big = made_index([("a", "x", 20)])
    told = str(audit_samples(big, [1.0], [], 1))
    assert told.endswith("lost x/0, x/1, x/2, x/3, x/4, x/5, x/6, x/7 and 12 more")
