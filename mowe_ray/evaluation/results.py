"""Results of an evaluation: the content of scores.json, and of its report.

Legend: M pool members. Scores are in percent, or points of 100.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GroupScore:
    """The main metric of some of a task's samples."""

    samples: int
    score: Interval


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task of a dataset; the task's first metric is its main one.

    Attributes:
        titles: Of the metrics in tables, with their unit, by name.
        better: `lower` or `higher`, by name.
        majority: What always giving the most frequent answer would score.
        unavailable: Why a metric that was asked for could not be computed.
        notes: What a reader of a score should know, by metric: who judged, and how many verdicts could not be read.
        normalisers: The rules that made transcripts comparable, by metric.
        groups: The main metric of the samples alike in something: by its name (category, difficulty), then its value.
    """

    dataset: str
    task: str
    samples: int
    scores: dict[str, Interval]
    titles: dict[str, str]
    better: dict[str, str]
    majority: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    normalisers: dict[str, str] = field(default_factory=dict)
    groups: dict[str, dict[str, GroupScore]] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """Name of the main metric."""
        return next(iter(self.scores))


@dataclass(frozen=True)
class Ablation:
    """Effect of excluding one pool member on a task's main metric: the routers cannot choose it.

    Attributes:
        change: Of the metric, without the member less with it, on the same samples.
        samples: How many those are.
        utilization: Conditional utilization rate: the share of the performance that is lost without the member.
    """

    member: str
    dataset: str
    task: str
    metric: str
    score: float
    change: Interval
    samples: int
    utilization: float | None = None


@dataclass(frozen=True)
class Shapley:
    """What one pool member adds to a task's main metric, averaged over the orders in which members may join.

    Attributes:
        value: In points of the metric, in its own direction.
        subsets: How many subsets of the pool answered; `is_exact` if those are all.
    """

    member: str
    dataset: str
    task: str
    metric: str
    value: Interval
    samples: int
    subsets: int
    is_exact: bool


@dataclass(frozen=True)
class PoolScore:
    """What the same weights score on a task with only some of the pool members, between which the routers choose.

    Attributes:
        score: As validations of a training give it: 0 to 1, higher is better.
        samples: Those that were answered with every pool.
    """

    members: list[str]
    dataset: str
    task: str
    score: float
    samples: int


@dataclass(frozen=True)
class ModelFacts:
    """A model and what it costs.

    Attributes:
        name: Unique in the evaluation.
        folder: Path or URL of the export.
        members: Names of the M pool members.
        stored, active: Weights, all and those that run for a clip on average; None of a model at a server.
        gflops: Work per clip of 30 s; None where it cannot be counted.
        real_time_factor: Seconds one worker needs for a second of audio; None of a model at a server.
    """

    name: str
    folder: str
    members: list[str]
    stored: float | None
    active: float | None
    gflops: float | None
    real_time_factor: float | None


@dataclass(frozen=True)
class Confusion:
    """How often each of L labels was answered where each was right.

    Attributes:
        counts: (L, L + 1) samples by right label and answered one; the last column is for answers without a label.
    """

    dataset: str
    task: str
    labels: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class EvaluatedModel(ModelFacts):
    """A model's results.

    Attributes:
        scores: By dataset and task.
        bad: Samples that could not be used, by dataset and cause.
        router_report: What `router_report` returns; None without routers.
        confusions: Of the tasks whose answers are one of a closed list.
        shapley: Of each pool member and task, if that was asked for.
        pools: Of each task and subset of the pool that Shapley values needed, the smallest first.
    """

    scores: list[TaskScores]
    bad: dict[str, dict[str, int]] = field(default_factory=dict)
    ablation: list[Ablation] = field(default_factory=list)
    router_report: dict[str, Any] | None = None
    confusions: list[Confusion] = field(default_factory=list)
    shapley: list[Shapley] = field(default_factory=list)
    pools: list[PoolScore] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """How a model differs from the baseline on the samples both answered, by paired bootstrap."""

    model: str
    dataset: str
    task: str
    metric: str
    difference: Interval
    samples: int


@dataclass(frozen=True)
class Clip:
    """A clip to listen to.

    Attributes:
        mp3: Its file.
        peaks: Loudness of equal parts of it, 0 to 100.
        seconds: Its length; `is_cut` if the sample's is longer.
    """

    mp3: bytes
    peaks: list[int]
    seconds: float
    is_cut: bool


@dataclass(frozen=True)
class SampleAnswer:
    """What a model made of a sample.

    Attributes:
        scores: By the metric's title.
        error: By how much the main metric misses its best value: 0 is right, 1 as wrong as can be.
        routing: By router (`dependent`, `independent`): name, probability of each member, and whether it ran.
        label: Numbers of the right label and of the answered one in the task's `Confusion`; None for open answers.
    """

    model: str
    answer: str
    scores: dict[str, float]
    error: float
    routing: dict[str, list[tuple[str, float, bool]]] = field(default_factory=dict)
    label: tuple[int, int] | None = None


@dataclass(frozen=True)
class ShownSample:
    """A sample of a report.

    Attributes:
        where: Its shard, and its file in there if that has a name.
        why: What makes it worth a look.
        choices: Of a multiple-choice question.
        groups: What it is scored apart by, such as {category: Reasoning, difficulty: hard}.
        clip: To listen to; None without audio, or where the page has no room for it.
        file: The clip's file beside the page, if it is not in the page.
    """

    dataset: str
    task: str
    id: str
    instruction: str
    references: list[str]
    duration_s: float
    where: str
    answers: list[SampleAnswer]
    why: str = ""
    choices: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    clip: Clip | None = None
    file: str = ""


@dataclass(frozen=True)
class Evaluation:
    """All models, side by side.

    Attributes:
        baseline: Name of the model that the others are compared with.
        device: What it ran on, in words.
        samples: Those that are shown, the most telling first.
    """

    models: list[EvaluatedModel]
    baseline: str
    differences: list[Difference]
    device: str
    samples: list[ShownSample] = field(default_factory=list)
