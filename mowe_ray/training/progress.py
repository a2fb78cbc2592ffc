"""One line of progress: where the run is, how fast it goes and how long it still takes."""

from __future__ import annotations

import math
import time

from mowe_ray.output.text import duration
from mowe_ray.training.loop import StepResult


class Progress:
    """Averages the steps since the last line, so that one slow step does not mislead."""

    def __init__(self, start_share: float):
        """Start the clock where `start_share` of the run is done."""
        self._begin_share, self._begin = start_share, time.monotonic()
        self._pending: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """Count one finished step."""
        self._pending.append(result)

    def take(self, share: float) -> dict[str, float]:
        """Return the averages since the last call, and forget them; `share` of the run is done now.

        Returns:
            `loss`, `lm_loss`, `routing_loss`, `grad_norm` over the steps that were not skipped, NaN if all were;
            `audio_s_per_s`, audio seconds of all ranks a second;
            `data_wait_share`, share of the time this rank waited for data; `padding_share` of the audio;
            `left_s`, seconds until the end of the run at the pace since the start.
        """
        steps, self._pending = self._pending, []
        seconds = sum(s.step_s for s in steps)
        gone_s = time.monotonic() - self._begin
        padded = sum(s.padded_s for s in steps)
        taken = [s for s in steps if not s.skipped]
        mean = {key: sum(getattr(s, key) for s in taken) / len(taken) if taken else math.nan for key in _AVERAGED}
        return mean | {
            "audio_s_per_s": sum(s.audio_s for s in steps) / seconds,
            "data_wait_share": sum(s.data_wait_s for s in steps) / seconds,
            "padding_share": 1.0 - sum(s.audio_s for s in steps) / padded if padded else 0.0,
            # The share can shrink, though hardly: when shards came while the run was at rest.
            "left_s": gone_s * (1.0 - share) / max(share - self._begin_share, 1e-9),
        }


_AVERAGED = ("loss", "lm_loss", "routing_loss", "grad_norm")


def progress_line(step: int, max_steps: int | None, share: float, averages: dict[str, float]) -> str:
    """Format what `Progress.take` returned for a person."""
    a = averages
    place = f"{step} ({int(100 * share)} %)" if max_steps is None else f"{step:>{len(str(max_steps))}}/{max_steps}"
    return (
        f"step {place}  loss {a['loss']:.3f} (lm {a['lm_loss']:.3f}, "
        f"routing {a['routing_loss']:.3f})  {a['audio_s_per_s']:.0f} audio-s/s  "
        f"data wait {a['data_wait_share']:.0%}  padding {a['padding_share']:.0%}  {duration(a['left_s'])} left"
    )
