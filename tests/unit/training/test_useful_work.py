import json
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mowe_ray.config.training_section import MoweLossSection
from mowe_ray.data.data_report import DataReport
from mowe_ray.data.epoch_plan import plan_epoch
from mowe_ray.data.runs import runs_of
from mowe_ray.model.cost import language_model_cost
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.build import assemble
from mowe_ray.training.collate import collate
from mowe_ray.training.estimate import estimate
from mowe_ray.training.flops import part_gflops
from mowe_ray.training.protocols import Ranks
from mowe_ray.training.useful_work import TrainingWork, Work
from tests.thread_ranks import on_ranks
from tests.tiny_models import tiny_tokenizer
from tests.unit.training.test_build import section
from tests.unit.training.test_monitor import make_monitor, read_records
from tests.unit.training.test_monitor_progress import result

DENSE = {"router": {"execution": "dense"}}


@cache
def made(max_s: float = 30.0, dense: bool = False) -> tuple[TrainingWork, torch.nn.Module]:
    model = estimate(section(**DENSE if dense else {})).model
    return TrainingWork(model, max_s=max_s), model


def bucket(seconds: float) -> float:
    """The length that Whisper's encoder gives to a clip, as `pad_audio=bucket` defines it."""
    return float(min(30.0, max(5.0, 2.5 * np.ceil(round((seconds + 2.56) / 2.5, 9)))))


def plan(durations: np.ndarray, batch_seconds: float = 120.0, max_batch_size: int = 32) -> list[list[np.ndarray]]:
    return list(
        plan_epoch(
            durations,
            runs_of(np.arange(len(durations)) // 100, np.zeros(len(durations), np.int64)),
            [1.0],
            seed=0,
            epoch=0,
            lanes=4,
            batch_seconds=batch_seconds,
            max_batch_size=max_batch_size,
            shuffle_buffer=10_000,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [(3.0, 7.3, 7.3), (12.0,), (29.99, 0.5)])
def test_clips_cost_what_their_encoders_cost_at_each_length(seconds):
    """Every part's own count at each length, in place of a polynomial through two lengths."""
    work, model = made()
    # Undecided top-1 routers: a member misses a clip with 1/2 * 1/2. Of the encoders only the small Whisper is trained.
    passes = {"base_encoder": 1.0, "weak_encoders.w": 3 * 0.75, "weak_encoders.h": 0.75, "projections": 3 * 0.75}

    def alone(length: float, padded: float) -> float:
        at, longer = (part_gflops(model, s, 1) for s in (length, padded))
        whispers = ("base_encoder", "weak_encoders.w")
        return sum(
            passes.get(name, 3.0) * (longer if name in whispers else at)[name].total
            for name in at
            if name != "language_model"
        )

    found = work.micro_batch(np.asarray(seconds), np.zeros(0))
    bare = sum(alone(s, s) for s in seconds)
    own = sum(alone(s, bucket(s)) for s in seconds)
    batch = len(seconds) * alone(max(seconds), bucket(max(seconds)))
    assert found.clips == pytest.approx(bare, rel=0.01)
    assert found.encoder_padding == pytest.approx(own - bare, rel=0.01, abs=1e-3)
    assert found.batch_padding == pytest.approx(batch - own, rel=0.01, abs=1e-3)
    assert found.idle == found.tokens == 0


def test_rows_cost_what_the_language_model_costs():
    work, model = made()
    rows = np.array([40, 90, 250])
    exact = [3 * language_model_cost(model.language_model, int(n)).gflops for n in rows]  # all of it is trained
    found = work.micro_batch(np.zeros(0), rows)
    assert found.tokens == pytest.approx(sum(exact), rel=1e-6)
    assert found.row_padding == pytest.approx(3 * exact[-1] - sum(exact), rel=1e-6)


@pytest.mark.slow
def test_a_real_training_step_executes_what_is_counted(tokenizer, make_micro_batch):
    """All operations of forward and backward on the CPU, against the sum over parts."""
    model, processor = assemble(
        section(**DENSE), MoweLossSection(), seed=0, tokenizer=tiny_tokenizer(chat_template=False), gpu=False
    )
    batch = collate(make_micro_batch([6.0, 4.0, 5.5]), processor)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(**batch.model_inputs).loss.backward()
    work, _ = made(dense=True)
    found = work.micro_batch(np.asarray(batch.clip_s), np.asarray(batch.row_tokens))
    assert found.executed == pytest.approx(counter.get_total_flops() / 1e9, rel=0.1)


def test_a_micro_batch_without_samples_is_idle(make_micro_batch):
    work, _ = made()
    found = work.micro_batch(np.zeros(0), np.zeros(0))
    assert found.executed == found.idle > 0
    assert found.useful_share == 0
    assert Work().useful_share == 1


def test_a_plan_is_the_sum_of_its_micro_batches_and_ranks_wait_for_the_slowest():
    work, _ = made()
    durations = np.array([2.0, 4.0, 10.0, 0.0], np.float32)
    steps = [[np.array([0, 1]), np.array([2])], [np.array([3]), np.array([], np.int64)]]
    # Frames of 20 ms, eight of which become a token: 13, 25 and 63.
    parts = [
        work.micro_batch(np.array([2.0, 4.0]), np.array([13, 25])),
        work.micro_batch(np.array([10.0]), np.array([63])),
        *[work.micro_batch(np.zeros(0), np.zeros(0))] * 2,
    ]
    total, balance = work.planned(steps, durations, 2)
    expected = sum(parts, Work())
    for cause, gflops in vars(expected).items():
        assert getattr(total, cause) == pytest.approx(gflops), cause
    a, b, c, d = (part.executed for part in parts)
    assert balance == pytest.approx((a + b + c + d) / (2 * max(a, b) + 2 * max(c, d)))
    assert work.planned(steps, durations, 1)[1] == pytest.approx(1.0)


UNIFORM = np.random.default_rng(0).uniform(1, 30, 10_000).astype(np.float32)
LOG_NORMAL = np.clip(np.random.default_rng(0).lognormal(np.log(6), 0.8, 10_000), 1, 30).astype(np.float32)


@pytest.mark.parametrize(("batch_seconds", "max_batch_size"), [(120.0, 32), (240.0, 8), (240.0, 64)])
@pytest.mark.parametrize(
    ("durations", "least"), [(UNIFORM, 0.94), (LOG_NORMAL, 0.86)], ids=["uniform 1-30 s", "log-normal, median 6 s"]
)
def test_most_of_the_work_on_mixed_lengths_is_useful(durations, least, batch_seconds, max_batch_size):
    """Of clips below 2.5 s, which share a bucket, up to half is padding: it limits corpora of short clips."""
    work, _ = made()
    total, _ = work.planned(plan(durations, batch_seconds, max_batch_size), durations, 4)
    assert total.useful_share >= least
    assert total.idle == 0


def test_the_share_is_logged_over_all_ranks(tmp_path, make_micro_batch, processor):
    work, _ = made()
    folder = RunFolder(str(tmp_path), "run")
    batches = [collate(make_micro_batch(seconds), processor) for seconds in ([1.0, 3.0], [8.0], [0.5, 0], [])]
    assert [batch.clip_s for batch in batches] == [[1.0, 3.0], [8.0], [0.5], []]
    assert batches[3].row_tokens == []
    assert [len(batch.row_tokens) for batch in batches[:3]] == [2, 1, 2]
    assert max(batches[0].row_tokens) == batches[0].inputs["input_ids"].shape[1]

    def run(ranks: Ranks) -> None:
        mine = work if ranks.is_rank_zero else None
        monitor = make_monitor(ranks, folder, [], work=mine, report=DataReport({"made": 10}))
        for step in (1, 2):
            monitor.step(result(step, batches=[batches[2 * ranks.rank + step - 1]]), progress=step / 2, last=step == 2)

    on_ranks(2, run)
    parts = [work.micro_batch(np.asarray(batch.clip_s), np.asarray(batch.row_tokens)) for batch in batches]
    executed = sum(part.executed for part in parts)
    lost = sum(part.batch_padding + part.row_padding + part.idle for part in parts)
    (record,) = read_records(folder, "train")
    assert json.loads(json.dumps(record))["useful_flops_share"] == pytest.approx(1 - lost / executed)
    assert 0 < record["useful_flops_share"] < 1
