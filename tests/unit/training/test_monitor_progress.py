import pytest

from mowe_ray.output.terminal import LINE
from mowe_ray.training.loop import StepResult
from mowe_ray.training.monitor import RunningAverages, progress_line

RATE = {"learning_rate": 2.5e-4}


def result(step: int, **changes) -> StepResult:
    values = {
        "loss": float(step),
        "lm_loss": 1.0,
        "routing_loss": 0.5,
        "grad_norm": 2.0,
        "skipped": False,
        "learning_rate_factor": 1.0,
        "answer_tokens": 10,
        "clips": 2,
        "audio_s": 6.0,
        "padded_s": 8.0,
        "data_wait_s": 0.5,
        "step_s": 2.0,
        "routing": None,
        "batches": [],
    }
    return StepResult(step=step, **values | changes)


def progress_after(progress: RunningAverages, share: float) -> dict[str, float]:
    progress.add(result(1))
    return progress.take(share)


def test_averages_cover_the_steps_since_the_last_line():
    now_s = [100.0]
    progress = RunningAverages(start_progress=0.4, clock=lambda: now_s[0])
    for step in (5, 6):
        progress.add(result(step))
    now_s[0] += 4
    taken = progress.take(0.6)
    assert taken["loss"] == 5.5
    assert taken["audio_s_per_s"] == pytest.approx(12 / 4)
    assert taken["data_wait_share"] == pytest.approx(1 / 4)
    assert taken["padding_share"] == pytest.approx(4 / 16)
    assert taken["left_s"] == pytest.approx(4 * 0.4 / 0.2)
    now_s[0] += 1
    first, second = progress_after(progress, 0.65), progress_after(progress, 0.9)
    assert first["left_s"] == pytest.approx(5 * 0.35 / 0.25)
    assert second["left_s"] == pytest.approx(5 * 0.1 / 0.5)
    assert progress_after(progress, 1.0)["left_s"] == 0
    longer = progress_after(progress, 0.3)
    assert longer["left_s"] == float("inf"), "new shards have made the run longer"
    assert progress_line(7, 10, 0.3, longer | RATE).endswith("wait 25%")
    progress.add(result(7, audio_s=0.0, padded_s=0.0))
    assert progress.take(0.7)["loss"] == 7.0
    line = progress_line(7, 10, 0.7, taken | RATE)
    assert line.startswith("step  7/10  loss")
    assert progress_line(7, None, 0.3599, taken | RATE).startswith("step 7 (35 %)  loss")
    assert "loss 5.500" in line
    assert "3 audio-s/s" in line
    assert "lr 2.5e-4" in line
    assert "wait 25%" in line
    assert line.endswith("8s left")


def test_the_line_of_a_long_run_fits_80_columns_with_the_time_of_day():
    taken = {"loss": 12.345, "audio_s_per_s": 52000.0, "data_wait_share": 1.0, "left_s": 900_000.0, **RATE}
    line = progress_line(999_999, 1_000_000, 0.99, taken)
    assert len(line) <= LINE
    assert line.endswith("250h00m left")


def test_text_only_steps_have_no_padding():
    progress = RunningAverages(start_progress=0.0)
    progress.add(result(1, audio_s=0.0, padded_s=0.0))
    assert progress.take(0.5)["padding_share"] == 0.0


def test_skipped_steps_leave_the_averages_alone():
    progress = RunningAverages(start_progress=0.0)
    nan = float("nan")
    progress.add(result(1))
    progress.add(result(2, loss=nan, lm_loss=nan, grad_norm=float("inf"), skipped=True))
    progress.add(result(3))
    taken = progress.take(0.75)
    assert (taken["loss"], taken["grad_norm"]) == (2.0, 2.0)
    assert taken["audio_s_per_s"] == pytest.approx(18 / 6), "its time was spent"
    progress.add(result(4, loss=nan, skipped=True))
    taken = progress.take(1.0)
    assert taken["loss"] != taken["loss"], "no step to average"
    assert "loss nan" in progress_line(4, 4, 1.0, taken | RATE)
