"""One line of progress: where the run is, how fast it goes and how long it still takes."""

from __future__ import annotations

import math
import time

from mowe_ray.training.loop import StepResult


class Progress:
    """Averages the steps since the last line, so that one slow step does not mislead."""

    def __init__(self, total_steps: int, start_step: int):
        """Start the clock at `start_step` finished steps."""
        self._total = total_steps
        self._begin_step, self._begin = start_step, time.monotonic()
        self._pending: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """Count one finished step."""
        self._pending.append(result)

    def take(self) -> dict[str, float]:
        """Return the averages since the last call, and forget them.

        Returns:
            `loss`, `lm_loss`, `routing_loss`, `grad_norm` over the steps that were not skipped, NaN if all were;
            `audio_s_per_s`, audio seconds of all ranks a second;
            `data_wait_share`, share of the time this rank waited for data; `padding_share` of the audio;
            `left_s`, seconds until the last step at the pace since the start.
        """
        steps, self._pending = self._pending, []
        seconds = sum(s.step_s for s in steps)
        done = steps[-1].step
        pace = (time.monotonic() - self._begin) / max(1, done - self._begin_step)
        padded = sum(s.padded_s for s in steps)
        taken = [s for s in steps if not s.skipped]
        mean = {key: sum(getattr(s, key) for s in taken) / len(taken) if taken else math.nan for key in _AVERAGED}
        return mean | {
            "audio_s_per_s": sum(s.audio_s for s in steps) / seconds,
            "data_wait_share": sum(s.data_wait_s for s in steps) / seconds,
            "padding_share": 1.0 - sum(s.audio_s for s in steps) / padded if padded else 0.0,
            "left_s": pace * (self._total - done),
        }


_AVERAGED = ("loss", "lm_loss", "routing_loss", "grad_norm")


def progress_line(step: int, total: int, averages: dict[str, float]) -> str:
    """Format what `Progress.take` returned for a person."""
    a = averages
    return (
        f"step {step:>{len(str(total))}}/{total}  loss {a['loss']:.3f} (lm {a['lm_loss']:.3f}, "
        f"routing {a['routing_loss']:.3f})  {a['audio_s_per_s']:.0f} audio-s/s  "
        f"data wait {a['data_wait_share']:.0%}  padding {a['padding_share']:.0%}  {duration(a['left_s'])} left"
    )


def duration(seconds: float) -> str:
    """Return seconds as `42s`, `3m05s` or `2h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
