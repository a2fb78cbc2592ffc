"""Every key of a sweep file.

The string under a field is its documentation. `space` maps what is varied to how: a dotted key of the
configuration to values or a range, `model.weak_encoders` to pools, any other name to named settings of several keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from mowe_ray.config.fields import CheckpointSource, Name, Probability, Section, TrainMode, refuse
from mowe_ray.config.plugins import PluginNames

POOL_KEY = "model.weak_encoders"
SUPERNET_KEY = "training.pool_dropout"  # set for the training whose weights score all pools, with search.kind oneshot


class LibraryEncoder(Section):
    """An encoder that pools are made of; its name is its key in `encoders`."""

    checkpoint: CheckpointSource
    """Weights: a hub id, a folder, or {config: {...}} for random ones."""
    train: TrainMode = "frozen"
    """What training changes: nothing, all weights, or low-rank updates."""
    features: str = "last"
    """Hidden states used: last, layer:N or weighted_sum."""


class Choice(Section):
    """One of the values."""

    choice: Annotated[list[Any], Field(min_length=1)]
    """Values to choose from."""


class Grid(Section):
    """Every value, together with every draw of the other entries."""

    grid: Annotated[list[Any], Field(min_length=1)]
    """Values that are all tried."""


class Uniform(Section):
    """A number between two others."""

    uniform: tuple[float, float]
    """Least and most."""


class LogUniform(Section):
    """A positive number between two others, uniform in its logarithm."""

    loguniform: tuple[PositiveFloat, PositiveFloat]
    """Least and most."""


class IntRange(Section):
    """An integer between two others, both included."""

    model_config = ConfigDict(populate_by_name=True)
    between: Annotated[tuple[int, int], Field(alias="int")]
    """Least and most."""


class SubsetsOf(Section):
    """Pools of different encoders."""

    of: Literal["all"] | list[Name] = "all"
    """Encoders of the library; all takes every one, those of the base configuration included."""
    sizes: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Numbers of encoders in a pool; 0 is no pool."""


class RepeatsOf(Section):
    """Uniform pools: one encoder several times."""

    of: Literal["all"] | list[Name] = "all"
    """Encoders of the library."""
    times: Annotated[list[PositiveInt], Field(min_length=1)]
    """How often each stands in a pool."""


class Pools(Section):
    """Pools of weak encoders, from any of the three."""

    subsets: SubsetsOf | None = None
    repeats: RepeatsOf | None = None
    pools: list[list[Name]] | None = None
    """Pools written out, as names of the library."""


class Settings(Section):
    """Several keys that change together, under a name."""

    settings: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """By name: the keys and their values."""


_KINDS = {
    "choice": "<choice>",
    "grid": "<grid>",
    "uniform": "<uniform>",
    "loguniform": "<loguniform>",
    "int": "<int>",
    "between": "<int>",
    "settings": "<settings>",
}


def _kind(value: object) -> str:
    keys = list(value) if isinstance(value, dict) else list(getattr(value, "model_fields_set", ()))
    return next((_KINDS[key] for key in keys if key in _KINDS), "<pools>")


Entry = Annotated[
    Annotated[Choice, Tag("<choice>")]
    | Annotated[Grid, Tag("<grid>")]
    | Annotated[Uniform, Tag("<uniform>")]
    | Annotated[LogUniform, Tag("<loguniform>")]
    | Annotated[IntRange, Tag("<int>")]
    | Annotated[Settings, Tag("<settings>")]
    | Annotated[Pools, Tag("<pools>")],
    Discriminator(_kind),
]


class SearchSection(Section):
    """How points of the space are chosen."""

    kind: Literal["grid", "random", "optuna", "oneshot"] = "grid"
    """All points; independent draws; Optuna's TPE, which learns from results; or pools with one training's weights."""
    seed: NonNegativeInt = 0
    """Seed of the draws."""
    startup_points: PositiveInt = 8
    """With optuna: draws before it begins to learn."""
    calibrate: Annotated[int, Field(ge=2)] = 6
    """With oneshot: pools, spread over the ranking, that are also trained alone, to see whether it can be trusted."""


class SchedulerSection(Section):
    """Which trials go on after each validation; times are in percent of a run."""

    kind: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    """All run to the end; early stopping; or population-based training."""
    grace_percent: Annotated[float, Field(gt=0, le=100)] = 25.0
    """Part of a run before which none is stopped (asha, median)."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of so many trials one goes on at each rung (asha, hyperband)."""
    interval_percent: Annotated[float, Field(gt=0, le=100)] = 20.0
    """Part of a run between two exchanges (pbt)."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the population that is replaced by copies of as large a share of the best (pbt)."""
    resample_probability: Probability = 0.25
    """Chance that a copied value is drawn anew rather than changed a little (pbt)."""


class ObjectiveSection(Section):
    """The objective of a study."""

    metric: Annotated[str, Field(pattern=r"^(score|loss|score\.[\w/-]+)$")] = "score"
    """score: mean over tasks on validation, higher is better; score.TASK: of one task; loss: lower is better."""
    against: Literal["active_parameters", "gflops"] | None = None
    """A cost to keep low at the same time; with optuna the search is multi-objective."""

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether more is better."""
        return "min" if self.metric == "loss" else "max"


class BudgetSection(Section):
    """Limits of the study."""

    points: PositiveInt | None = None
    """Points of the space to try, each with every seed; null: all of a grid."""
    hours: PositiveFloat | None = None
    """Wall-clock hours after which running trials are stopped and no other begins."""
    trial_hours: PositiveFloat | None = None
    """Wall-clock hours after which a single trial counts as failed."""


class ResourcesSection(Section):
    """How trials share the cluster."""

    concurrent: PositiveInt | None = None
    """Trials at a time; null: as many as fit."""
    retries: NonNegativeInt = 1
    """How often a failed trial is tried again, from its last checkpoint."""
    share_features: bool = True
    """Keep decoded audio and features of frozen encoders in STORAGE/features for all trials (local storage only)."""


class SweepConfig(Section):
    """Configuration of a study."""

    plugins: PluginNames = []
    """Python files and packages of yours that all trials import first, besides those of the base."""
    name: Name
    """Name of the study; its results go to STORAGE/NAME."""
    question: str
    """What the study is to answer, in one sentence."""
    storage: str = "runs"
    """Folder or URL (s3, gs, ...) that holds it."""
    base: str = "quickstart"
    """Preset or configuration file that every trial starts from."""
    set: dict[str, Any] = {}
    """Dotted keys of the configuration with a value for all trials."""
    set_for: dict[str, dict[str, Any]] = {}
    """The same by base: what applies only to trials of that base."""
    encoders: dict[Name, LibraryEncoder] = {}
    """Encoders for pools, by name, beside those of the base configuration."""
    space: Annotated[dict[str, Entry], Field(min_length=1)]
    """What is varied, and how."""
    search: SearchSection = SearchSection()
    scheduler: SchedulerSection = SchedulerSection()
    objective: ObjectiveSection = ObjectiveSection()
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    """Seeds every point is trained with: replicas, compared by their mean."""
    constraints: list[str] = []
    """Conditions on a point, such as `model.router.top_k <= pool_size`; others are never trained."""
    budget: BudgetSection = BudgetSection()
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _fits_together(self) -> SweepConfig:
        ranges = [name for name, entry in self.space.items() if isinstance(entry, Uniform | LogUniform)]
        grids = [name for name, entry in self.space.items() if isinstance(entry, Grid)]
        kind, pbt = self.search.kind, self.scheduler.kind == "pbt"
        refuse(
            f"space.{ranges[0]}: a grid cannot hold a range; give values, or set search.kind to random or optuna"
            if ranges and kind == "grid"
            else None,
            f"space.{grids[0]}: optuna chooses values itself; write choice instead of grid"
            if grids and kind == "optuna"
            else None,
            f"budget.points: {kind} needs a number of points"
            if kind in ("random", "optuna") and self.budget.points is None
            else None,
            self._unfit_for_oneshot() if kind == "oneshot" else None,
            "scheduler.kind: pbt needs search.kind random, and something to change: a range of "
            "training.learning_rate, training.lr_per_part.*, training.weight_decay or training.mowe_loss.weight"
            if pbt and (kind != "random" or not self.mutable)
            else None,
            "seeds: pbt copies weights between trials, which must share one seed"
            if pbt and len(self.seeds) > 1
            else None,
        )
        return self

    def _unfit_for_oneshot(self) -> str | None:
        pools = self.space.get(POOL_KEY)
        if not isinstance(pools, Pools) or pools.subsets is None or pools.repeats or pools.pools or len(self.space) > 1:
            return f"space: oneshot searches {POOL_KEY} alone, given as subsets: {{of: ..., sizes: [...]}}"
        if self.scheduler.kind != "none":
            return "scheduler.kind: oneshot compares complete trainings; write none"
        if self.budget.points is not None:
            return "budget.points: with oneshot, search.calibrate says how many pools are trained alone; write null"
        return "objective.metric: oneshot ranks by score or score.TASK" if self.objective.metric == "loss" else None

    def is_supernet(self, values: Mapping[str, Any]) -> bool:
        """Whether a point is the training whose weights answer for all pools of a one-shot search."""
        return self.search.kind == "oneshot" and SUPERNET_KEY in values

    @property
    def entries(self) -> list[str]:
        """What tells trials apart: the entries of the space, and what the search adds."""
        return [*self.space, *([SUPERNET_KEY] if self.search.kind == "oneshot" else [])]

    @property
    def mutable(self) -> list[str]:
        """Entries that may change in the middle of a run."""
        return [
            name
            for name in self.space
            if name in ("training.learning_rate", "training.weight_decay", "training.mowe_loss.weight")
            or name.startswith("training.lr_per_part.")
        ]
