"""Reports of a run: progress lines, metrics, the data report, the router report."""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise

import numpy as np
import torch

from mowe_ray.data.data_report import DataReport
from mowe_ray.data.sample import BadSample
from mowe_ray.evaluation.routing import RoutingSums, draw, router_report, write_router_report
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import LINE, Clock, Pace, ProgressLine, duration, folded, wrapped
from mowe_ray.training.loop import StepResult
from mowe_ray.training.protocols import Ranks, RunError
from mowe_ray.training.tracker import Tracker
from mowe_ray.training.useful_work import TrainingWork, Work
from mowe_ray.training.validation import ValidationResult

_SHOWN = 8  # ids in a line for the user


class Monitor:
    """Collects metrics on every rank; rank 0 writes them.

    Every method is collective: all ranks call it with the same step.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        folder: RunFolder,
        tracker: Tracker | None,
        report: DataReport,
        members: list[str],
        start_progress: float,
        max_steps: int | None,
        log_every: int,
        max_bad_fraction: float,
        max_skipped_steps: int,
        learning_rates: Mapping[str, float],
        work: TrainingWork | None = None,
    ):
        """Start where `start_progress` (0 to 1) of the run is done; `tracker` is None on all ranks but 0.

        Args:
            report: What scanning the shards found; what decoding finds comes on top.
            members: Names of the pool members.
            max_steps: Length of the run, if it is given in steps.
            learning_rates: Peaks, by their names in records.
            work: What micro-batches cost, on rank 0, to log the useful share of it.
        """
        self._work, self._lengths = work, list[tuple[list[float], list[int]]]()
        self._ranks, self.folder, self._tracker = ranks, folder, tracker
        self._report, self._new_bad = report, list[BadSample]()
        self._members = members
        self._routing: RoutingSums | None = None  # of the steps since the last line: those of one are a zigzag
        self._peak_rates = learning_rates
        self._max_steps, self._log_every, self._max_bad_fraction = max_steps, log_every, max_bad_fraction
        self._averages = RunningAverages(start_progress)
        self._max_skipped_steps, self._skipped, self._skipped_in_a_row = max_skipped_steps, 0, 0
        self._spikes = SpikeDetector()

    def step(self, result: StepResult, *, progress: float, last: bool) -> None:
        """Take in one training step; log, and check the data, every `log_every` steps and at the `last`.

        Args:
            progress: Fraction of the run that is done with it.

        Raises:
            RunError: On all ranks: too much of the data is unusable, or too many steps in a row were skipped.
        """
        # Also skipped steps, which cost time; `take` leaves them out of the means of losses.
        self._averages.add(result)
        if result.routing is not None and not result.skipped:
            self._routing = result.routing if self._routing is None else self._routing + result.routing
        if result.skipped:
            self._log_skipped(result)
        else:
            self._skipped_in_a_row = 0
            self._log_spike(result)
        self._new_bad += [bad for batch in result.batches for bad in batch.bad]
        self._lengths += [(batch.clip_s, batch.row_tokens) for batch in result.batches]
        # Bad samples wait until then: each check is a collective.
        if result.step % self._log_every and not last:
            return
        self._check_data()
        averages = self._averages.take(progress) | self._useful_share_and_memory()
        routing, self._routing = self._routing, None
        averages |= {name: result.learning_rate_factor * peak for name, peak in self._peak_rates.items()}
        if self._tracker is None:
            return
        self._tracker.log(
            {
                "kind": "train",
                "step": result.step,
                **averages,
                "answer_tokens": result.answer_tokens,
                "clips": result.clips,
                "skipped_steps": self._skipped,
                "bad_samples": self._report.bad_count,
                **({} if routing is None else {"routing": routing.summary(self._members)}),
            }
        )
        self._ranks.log(ProgressLine(progress_line(result.step, self._max_steps, progress, averages), progress))

    def recovered(self, step: int, spans: Mapping[str, float]) -> None:
        """Log how long it took to come back after a failure, by phase in seconds; on rank 0 alone."""
        if self._tracker is not None and spans:
            total = sum(spans.values())
            self._tracker.log({"kind": "recovery", "step": step, "seconds": total, **spans})
            phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in spans.items())
            self._ranks.log(f"recovered in {total:.1f} s ({phases})")

    def validation(self, step: int, results: dict[str, ValidationResult]) -> None:
        """Log one validation of every source, by the source's name; not again after a restart at that step."""
        for name, result in results.items():
            self._add_bad(result.bad)
            if self._tracker is None or (step, name) in self._tracker.validated:
                continue
            self._tracker.log(
                {"kind": "validation", "source": name, "step": step, "loss": result.loss, "tasks": result.tasks}
            )
            scores = [f"{t} {v['score']:.2f} (majority {v['majority']:.2f})" for t, v in result.tasks.items()]
            self._ranks.log(folded([f"validation {name} at step {step}: loss {result.loss:.3f}", *scores]))
            self._show(step, name, result)

    def validated(self, step: int, sources: Collection[str]) -> bool:
        """Return whether the records have the validation of all `sources` after `step`; on rank 0 alone."""
        return self._tracker is not None and all((step, name) in self._tracker.validated for name in sources)

    def _show(self, step: int, source: str, result: ValidationResult) -> None:
        """Show answers with their audio, and what the routers chose, in the trackers that can."""
        assert self._tracker is not None
        if not self._tracker.shows_media:
            return
        answers = [answer for answer in result.answers if answer.id in result.waves]
        if answers:
            self._tracker.log_samples(source, step, answers, result.waves)
        if self._members and result.routing:
            chosen = router_report(self._members, {source: result.routing}, [])
            self._tracker.log_picture(f"routing/{source}", step, draw(chosen))

    def finish(self, results: dict[str, ValidationResult]) -> None:
        """Write the reports of the finished run."""
        if self._tracker is None:
            return
        self._write_report()
        for name, result in results.items():
            self.folder.write_lines(f"answers/{name}.jsonl", (answer.to_line() for answer in result.answers))
        routing = {name: result.routing for name, result in results.items() if result.routing}
        if self._members and routing:
            history = [r for r in self._tracker.records() if r["kind"] == "train" and "routing" in r]
            write_router_report(self.folder, router_report(self._members, routing, history))
        self._tracker.close()

    def flush(self) -> None:
        """Write the metrics so far; not collective, from any thread."""
        if self._tracker is not None:
            self._tracker.flush()

    def close(self) -> None:
        """Finish the trackers of a run that stops before its end."""
        self._add_new_bad()
        if self._tracker is not None:
            with contextlib.suppress(OSError):  # the run has saved what it resumes from
                self._tracker.close()

    def _log_skipped(self, result: StepResult) -> None:
        """Log and count a step that changed no weights; all ranks know that it did not."""
        self._skipped += 1
        self._skipped_in_a_row += 1
        ids = self._global_ids(result)
        reason = "gradient" if math.isfinite(result.loss) else "loss"
        if self._tracker is not None:
            self._tracker.log({"kind": "skipped", "step": result.step, "reason": reason, "ids": ids})
            self._ranks.log(f"warning: step {result.step} skipped, its {reason} is not finite; samples: {_some(ids)}")
        if self._skipped_in_a_row >= self._max_skipped_steps:
            raise RunError(
                f"{self._skipped_in_a_row} steps in a row were skipped, the last is step {result.step}: loss or "
                "gradient was not finite (training.max_skipped_steps). The checkpoints are kept. Lower "
                f"training.learning_rate or training.clip_norm, or look at the last samples: {_some(ids)}"
            )

    def _log_spike(self, result: StepResult) -> None:
        expected = self._spikes.expected_if_spike(result.lm_loss)
        if expected is None:
            return
        ids = self._global_ids(result)
        if self._tracker is not None:
            record = {"step": result.step, "loss": result.lm_loss, "expected": expected, "ids": ids}
            self._tracker.log({"kind": "spike", **record})
            detail = f"lm {result.lm_loss:.3f}, expected about {expected:.3f}; samples: {_some(ids)}"
            self._ranks.log(wrapped(f"warning: loss spike at step {result.step}: {detail}"))

    def _global_ids(self, result: StepResult) -> list[str]:
        """Ids of all samples of the step, over all ranks."""
        ranks = self._ranks.gather([name for batch in result.batches for name in batch.ids])
        return [name for rank in ranks for name in rank]

    def _useful_share_and_memory(self) -> dict[str, float]:
        """Return the largest peak of memory of a rank, and on rank 0 the share of all work that was no padding.

        Collective.
        """
        lengths, peaks = zip(*self._ranks.gather((self._lengths, _peak_memory_bytes())), strict=True)
        self._lengths = []
        memory = {"peak_memory_bytes": max(peaks)}
        if self._work is None:
            return memory
        work = [self._work.micro_batch(np.asarray(clips), np.asarray(rows)) for rank in lengths for clips, rows in rank]
        return {**memory, "useful_flops_share": sum(work, Work()).useful_share}

    def _check_data(self) -> None:
        self._add_new_bad()
        try:
            self._report.check(self._max_bad_fraction)
        except ValueError as error:  # all ranks hold the same report, so all of them stop here
            if self._ranks.is_rank_zero:
                self._write_report()
            raise RunError(str(error)) from error

    @property
    def killers(self) -> list[BadSample]:
        """Samples that ended the process that decoded them, as far as all ranks know of them."""
        return self._report.killers

    def _add_new_bad(self) -> None:
        for bad in self._ranks.gather(self._new_bad):
            self._add_bad(bad)
        self._new_bad = []

    def _add_bad(self, found: Iterable[BadSample]) -> None:
        """Count unusable samples; those that ended a process are logged and, for the next start, written at once."""
        before = len(self.killers)
        self._report.add(found)
        if self._tracker is None or len(self.killers) == before:
            return
        for sample in self.killers[before:]:
            self._ranks.log(f"warning: {sample.id} is left out from now on (data_report.json), {sample.detail}")
        with contextlib.suppress(OSError):  # a full disk; the end of the run writes it again
            self._write_report()

    def _write_report(self) -> None:
        self.folder.write_json("data_report.json", self._report.to_json())


def _peak_memory_bytes() -> int:
    """Return the most memory this process has had: of its GPU, or without one of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def _some(ids: list[str]) -> str:
    """Return the first few of `ids`; metrics.jsonl has them all."""
    return ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


class RunningAverages:
    """Averages the steps since the last line, so that one slow step does not mislead."""

    def __init__(self, start_progress: float, clock: Clock = time.monotonic):
        """Start the clock where `start_progress` of the run is done."""
        self._pace = Pace(total=1.0, done=start_progress, clock=clock)
        self._pending: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """Count one finished step."""
        self._pending.append(result)

    def take(self, progress: float) -> dict[str, float]:
        """Return the averages since the last call, and forget them; `progress` of the run is done now.

        Returns:
            `loss`, `lm_loss`, `routing_loss`, `grad_norm` over the steps that were not skipped, NaN if all were, and
            `routing_loss_NAME` for each part of the routing loss;
            `step_s`, seconds of a step; `audio_s_per_s`, audio seconds of all ranks a second;
            `data_wait_share`, fraction of the time this rank waited for data; `padding_share` of the audio;
            `left_s`, seconds until the end of the run at the pace since the start; infinite while progress is not
            above the start, as after shards were added to a run at rest.
        """
        steps, self._pending = self._pending, []
        # Time of steps, not of the clock: validation and checkpoints in between do not count as slow training.
        seconds = sum(s.step_s for s in steps)
        self._pace.done = progress
        left_s = self._pace.left_s
        padded = sum(s.padded_s for s in steps)
        taken = [s for s in steps if not s.skipped]
        mean = {key: sum(getattr(s, key) for s in taken) / len(taken) if taken else math.nan for key in _AVERAGED}
        parts = {name for step in taken for name in step.routing_losses}
        mean |= {f"routing_loss_{n}": sum(s.routing_losses[n] for s in taken) / len(taken) for n in sorted(parts)}
        return mean | {
            "step_s": seconds / len(steps),
            "audio_s_per_s": sum(s.audio_s for s in steps) / seconds,
            "data_wait_share": sum(s.data_wait_s for s in steps) / seconds,
            "padding_share": 1.0 - sum(s.audio_s for s in steps) / padded if padded else 0.0,
            "left_s": math.inf if left_s is None else left_s,
        }


_AVERAGED = ("loss", "lm_loss", "routing_loss", "grad_norm")


def progress_line(step: int, max_steps: int | None, progress: float, averages: dict[str, float]) -> str:
    """Format what `RunningAverages.take` returned for the user, with the learning rate; fits 80 columns."""
    a = averages
    place = f"{step} ({int(100 * progress)} %)" if max_steps is None else f"{step:>{len(str(max_steps))}}/{max_steps}"
    rate = f"{a['learning_rate']:.1e}".replace("e-0", "e-")
    parts = [f"step {place}", f"loss {a['loss']:.3f}", f"lr {rate}"]
    speed = [f"{a['audio_s_per_s']:.0f} audio-s/s", f"wait {a['data_wait_share']:.0%}"]
    left = [f"{duration(a['left_s'])} left"] if math.isfinite(a["left_s"]) else []
    # A run of a million steps has no room for all of it; the records have.
    lines = ["  ".join([*parts, *speed[:count], *left]) for count in (2, 1, 0)]
    return next((line for line in lines if len(line) <= LINE), lines[-1])


_LEVEL = 20  # steps the expected loss is the median of, and history it takes before anything is called a spike
_WINDOW = 128  # steps the noise is estimated from
_SIGMAS = 7.0
_LEAST = 0.1  # a spike is at least this fraction above the expected loss, however quiet the curve


class SpikeDetector:
    """Compares each loss with the recent level, in units of the noise between neighbouring steps.

    A spike lies more than 7 standard deviations above the level: the limit with which OLMo 2 counts its spikes
    (arXiv 2501.00656, "spike score"); 128 steps are the window of llm.c's outlier detector. Both take mean and standard
    deviation, which one spike inflates so that it hides the next, and the fall of the loss inflates besides. Here the
    level is a median, and the standard deviation comes from the median absolute difference of neighbouring losses: a
    median of deviations is what Leys et al. recommend for outliers (J. Exp. Soc. Psychol. 49(4), 2013, 764-766), and
    differences hardly see a trend (von Neumann 1941).
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def expected_if_spike(self, loss: float) -> float | None:
        """Take in the next step's finite loss; returns the loss that was expected if it is a spike, else None."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < _LEVEL:
            return None
        level = statistics.median(before[-_LEVEL:])
        limit = level + max(_SIGMAS * _noise(before), _LEAST * level)
        return level if loss > limit else None


def _noise(losses: list[float]) -> float:
    """Return the standard deviation of a step's loss, for normally distributed noise on any slow trend.

    A difference of two has sqrt(2) times the deviation of one; the median of its absolute value is 0.6745 of that.
    """
    return statistics.median(abs(b - a) for a, b in pairwise(losses)) / (0.6745 * 2**0.5)
