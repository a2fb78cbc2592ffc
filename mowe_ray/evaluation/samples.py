"""The samples of a report: the most telling first, with what each model made of them, and their clips as small MP3."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import av
import numpy as np
import numpy.typing as npt

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.evaluation.metrics.classification import label_numbers
from mowe_ray.evaluation.metrics.metric import Metric
from mowe_ray.evaluation.metrics.registry import DatasetMetrics
from mowe_ray.evaluation.predictions import Answer, RouterChoice, by_task
from mowe_ray.evaluation.results import Clip, SampleAnswer, ShownSample

# Means over labels say nothing of one sample.
_OF_SETS = ("unweighted_accuracy", "macro_f1")
_BARS = 96  # of a waveform
BITS_PER_S = 40_000  # speech and sounds at 16 kHz stay what they are
_SILENCE_S = 0.3  # between the clips of a sample


def shown_samples(
    answers: Mapping[str, Mapping[str, Sequence[Answer]]],
    members: Mapping[str, Sequence[str]],
    metrics: Mapping[str, DatasetMetrics],
    most: int | None,
) -> list[ShownSample]:
    """Return the samples that a report shows, the most telling first.

    Of every test set in turn: the one with the most errors, the one on which the models differ most, one that is right,
    and the one about which the router is least sure; then again, as long as there are any.

    Args:
        answers: By model and dataset; samples that only some models answered count by their answers.
        members: Names of the pool members by model.
        metrics: Of each dataset.
        most: How many at most; None for all.
    """
    datasets = dict.fromkeys(name for by_dataset in answers.values() for name in by_dataset)
    sets = [
        _TestSet(dataset, task, {m: tasks[task] for m, tasks in by_model.items() if task in tasks}, metrics[dataset])
        for dataset in datasets
        for by_model in [{model: by_task(found.get(dataset, ())) for model, found in answers.items()}]
        for task in sorted({task for tasks in by_model.values() for task in tasks})
    ]
    chosen = [(one, *pick) for one, pick in _in_turn([(one, one.ranked()) for one in sets], most)]
    wanted = {id(one): [name for other, name, _ in chosen if other is one] for one in sets}
    made = {(id(one), sample.id): sample for one in sets for sample in one.samples(wanted[id(one)], members)}
    return [replace(made[id(one), name], why=why) for one, name, why in chosen]


def _in_turn(
    rankings: Sequence[tuple[_TestSet, dict[str, list[str]]]], most: int | None
) -> Iterator[tuple[_TestSet, tuple[str, str]]]:
    """Yield (test set, (id, why)): of each ranking of each test set in turn the first that has not been taken."""
    taken: dict[int, set[str]] = {id(one): set() for one, _ in rankings}
    left = [(one, why, iter(ranked[why])) for why in _WHY for one, ranked in rankings]
    number = 0
    while left and (most is None or number < most):
        going_on = []
        for one, why, names in left:
            found = next((name for name in names if name not in taken[id(one)]), None)
            if found is None or number == most:
                continue
            going_on.append((one, why, names))
            taken[id(one)].add(found)
            number += 1
            yield one, (found, why)
        left = going_on


_WHY = ("most errors", "models differ", "right", "router unsure")


class _TestSet:
    """A task of a dataset with the answers of all models to it."""

    def __init__(self, dataset: str, task: str, answers: Mapping[str, Sequence[Answer]], metrics: DatasetMetrics):
        self.dataset, self.task = dataset, task
        first = next(iter(answers.values()))
        self._metrics = [m for m in metrics.of(task, first)[0] if m.name not in _OF_SETS]
        self._answers = {model: {answer.id: answer for answer in found} for model, found in answers.items()}
        self._errors = {
            model: dict(zip((a.id for a in found), errors_of(self._metrics[0], found), strict=True))
            for model, found in answers.items()
        }
        closed = any(metric.name == "accuracy" for metric in self._metrics)
        self.labels = metrics.closed_list(first) if closed else []

    def ranked(self) -> dict[str, list[str]]:
        """Return the ids by why they are worth a look, the most telling first."""
        names = list(dict.fromkeys(name for found in self._answers.values() for name in found))
        errors = {name: [found[name] for found in self._errors.values() if name in found] for name in names}
        wrong = {name: sum(found) / len(found) for name, found in errors.items()}
        spread = {name: max(found) - min(found) for name, found in errors.items()}
        unsure = {
            name: max(_unsure(found[name]) for found in self._answers.values() if name in found) for name in names
        }
        return {
            "most errors": sorted((name for name in names if wrong[name]), key=lambda name: -wrong[name]),
            "models differ": sorted((name for name in names if spread[name]), key=lambda name: -spread[name]),
            "right": [name for name in names if not wrong[name]],
            "router unsure": sorted((name for name in names if unsure[name]), key=lambda name: -unsure[name]),
        }

    def samples(self, names: Sequence[str], members: Mapping[str, Sequence[str]]) -> Iterator[ShownSample]:
        """Yield what a report shows of these samples."""
        made: dict[str, list[SampleAnswer]] = {name: [] for name in names}
        for model, found in self._answers.items():
            answers = [found[name] for name in names if name in found]
            values = {metric.title: _values(metric, answers) for metric in self._metrics}
            cells = label_numbers(answers, self.labels) if self.labels else [None] * len(answers)
            for i, answer in enumerate(answers):
                scores = {title: float(value[i]) for title, value in values.items() if math.isfinite(value[i])}
                routing = _routing(answer, members[model])
                error = self._errors[model][answer.id]
                made[answer.id].append(SampleAnswer(model, answer.answer, scores, error, routing, cells[i]))
        for name in names:
            first = next(found[name] for found in self._answers.values() if name in found)
            yield ShownSample(
                self.dataset,
                self.task,
                name,
                first.instruction,
                first.references,
                first.duration_s,
                f"{first.shard} {first.path}".strip(),
                made[name],
                choices=first.choices,
                groups=first.groups,
            )


def errors_of(metric: Metric, answers: Sequence[Answer]) -> list[float]:
    """Return by how much each answer misses the best value of a metric, from 0 (right) to 1."""
    missed = _values(metric, answers) if metric.better == "lower" else 100 - _values(metric, answers)
    return [round(float(value), 4) for value in np.clip(np.nan_to_num(missed / 100, nan=1.0), 0, 1)]


def _values(metric: Metric, answers: Sequence[Answer]) -> npt.NDArray[np.float64]:
    """Return the metric of each answer alone."""
    return metric.value(metric.statistics(answers)) if answers else np.zeros(0)


def _unsure(answer: Answer) -> float:
    """Entropy of the router that looks at the clip, in nats; 0 without one."""
    return sum(-p * math.log(p) for p in answer.dependent.probabilities if 0 < p < 1) if answer.dependent else 0.0


def _routing(answer: Answer, members: Sequence[str]) -> dict[str, list[tuple[str, float, bool]]]:
    routers: dict[str, RouterChoice | None] = {"dependent": answer.dependent, "independent": answer.independent}
    return {
        name: [(m, p, load > 0) for m, p, load in zip(members, made.probabilities, made.load, strict=True)]
        for name, made in routers.items()
        if made is not None
    }


def encoded_clip(waves: Sequence[npt.NDArray[np.float32]], most_s: float) -> Clip:
    """Return the clips of a sample, one after the other, as MP3, which every browser plays, with their waveform.

    Args:
        waves: In -1..1, at 16 kHz.
        most_s: What is longer is cut, in seconds.
    """
    pause = np.zeros(round(_SILENCE_S * SAMPLE_RATE), np.float32)
    joined = np.concatenate([part for wave in waves for part in (pause, wave)][1:])
    wave = joined[: round(min(most_s, len(joined) / SAMPLE_RATE) * SAMPLE_RATE)]
    loudest = np.array([np.abs(part).max(initial=0.0) for part in np.array_split(wave, _BARS)])
    peaks = np.rint(100 * loudest / max(1e-6, float(loudest.max()))).astype(int).tolist()
    return Clip(_mp3(wave), peaks, len(wave) / SAMPLE_RATE, len(wave) < len(joined))


def _mp3(wave: npt.NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=SAMPLE_RATE, layout="mono", format="fltp")
        stream.bit_rate = BITS_PER_S
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packets in (stream.encode(frame), stream.encode(None)):
            container.mux(packets)
    return file.getvalue()
