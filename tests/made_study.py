"""Made-up studies: what the trials of a sweep would have left behind, without training anything."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mowe_ray.sweeping.schema import POOL_KEY, SweepConfig
from mowe_ray.sweeping.trials import History, ModelCost, Trial, Validation

ENCODERS = ("hubert", "whisper", "wavlm")
TASKS = ("asr", "er", "aqa")
STEPS = 600
Values = dict[str, Any]
Scores = float | Mapping[str, float]
# Half widths of noise between seeds, in turn: made-up results are the same each time and their mean has no noise.
_NOISE = (1.0, -1.0, 0.0)


def sweep(space: Mapping[str, Any], **keys: Any) -> SweepConfig:
    """A study of `space`; its base and library need not exist."""
    library = {name: {"checkpoint": f"hub/{name}"} for name in ENCODERS}
    named = {"name": "made-up", "question": "Which pool of weak encoders is worth its cost?", "encoders": library}
    return SweepConfig.model_validate({**named, "space": space, **keys})


def grid(**entries: Sequence[Any]) -> list[Values]:
    """All combinations; `pool` stands for the pool, and __ for a dot in other names."""
    names = [POOL_KEY if name == "pool" else name.replace("__", ".") for name in entries]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*entries.values())]


def subsets(sizes: Iterable[int] = range(4), of: Sequence[str] = ENCODERS) -> list[list[str]]:
    """Pools of different encoders."""
    return [list(names) for size in sizes for names in itertools.combinations(of, size)]


def trial(number: int, point: int, seed: int, values: Values, scores: Scores, **fields: Any) -> Trial:
    """A finished trial; one score stands for all tasks, the loss follows the scores, the cost the pool."""
    samples = fields.pop("samples", 400)
    by_task = dict(scores) if isinstance(scores, Mapping) else dict.fromkeys(TASKS, scores)
    pool = values.get(POOL_KEY, [])
    active = 1.0e6 + 2.1e5 * min(len(pool), values.get("model.router.top_k", 1))
    return replace(
        Trial(number, point, seed, values, "finished", attempts=1, step=STEPS, percent=100.0, wall_s=120.0),
        loss=2.0 - sum(by_task.values()) / len(by_task),
        tasks={t: {"score": s, "majority": 0.3, "samples": samples} for t, s in by_task.items()},
        cost=ModelCost(1.0e6 + 2.1e5 * len(pool), active, 3.0 * active / 1e6),
        device_s=240.0,
        **fields,
    )


def trials(
    config: SweepConfig,
    designed: Sequence[Values],
    score: Callable[[Values], Scores],
    noise: float = 0.01,
    **fields: Any,
) -> list[Trial]:
    """Finished trials of each designed point with every seed; `noise` is added to all scores, by seed in turn."""
    made = []
    for point, values in enumerate(designed):
        for i, seed in enumerate(config.seeds):
            off = noise * _NOISE[i % 3] * (-1) ** point if len(config.seeds) > 1 else 0.0
            scores = score(values)
            named = scores if isinstance(scores, Mapping) else dict.fromkeys(TASKS, scores)
            moved = {task: min(1.0, max(0.0, value + off)) for task, value in named.items()}
            made.append(trial(len(made), point, seed, values, moved, **fields))
    return made


def stopped(one: Trial, percent: float = 25.0) -> Trial:
    """The trial, had the scheduler stopped it."""
    return replace(one, status="stopped", percent=percent, step=int(STEPS * percent / 100))


def failed(one: Trial, error: str = "OutOfMemoryError: tried to allocate 3 GiB") -> Trial:
    """The trial, had it failed before its first validation."""
    return replace(one, status="failed", error=error, attempts=2, step=30, percent=5.0, loss=None, tasks={})


def planted(values: Values) -> dict[str, float]:
    """Scores where only hubert carries what `er` needs, and a second active encoder helps a little."""
    bonus = 0.03 * (values.get("model.router.top_k", 1) == 2)
    pool = values[POOL_KEY]
    return {"asr": 0.55 + bonus, "er": (0.86 if "hubert" in pool else 0.38) + bonus, "aqa": 0.5 + 0.01 * len(pool)}


def planted_study() -> tuple[SweepConfig, list[Trial]]:
    """All pools of three encoders, two values of top-k, two seeds; some trials stopped early or failed."""
    space = {POOL_KEY: {"subsets": {"sizes": [0, 1, 2, 3]}}, "model.router.top_k": {"grid": [1, 2]}}
    config = sweep(space, seeds=[0, 1])
    made = trials(config, grid(pool=subsets(), model__router__top_k=[1, 2]), planted, noise=0.012)
    made[1] = stopped(made[1])
    made[9] = stopped(made[9], 50.0)
    made[13] = failed(made[13])
    return config, made


def history(one: Trial, seed: int = 0) -> History:
    """A plausible course that ends at the trial's last validation."""
    noise = np.random.default_rng([seed, one.number])
    steps = [step for step in range(50, one.step + 1, 50) if one.tasks]
    validations = [
        Validation(
            step,
            (one.loss or 0.0) + 1.5 * math.exp(-step / 150) + float(noise.normal(0, 0.01)),
            {
                name: {
                    **task,
                    "score": max(0.0, task["score"] * (1 - math.exp(-step / 140)) + float(noise.normal(0, 0.008))),
                }
                for name, task in one.tasks.items()
            },
        )
        for step in steps
    ]
    losses = [
        (s, (one.loss or 1.5) + 2 * math.exp(-s / 120) + float(noise.normal(0, 0.05))) for s in range(10, one.step, 10)
    ]
    return History(validations, losses, _routing(one, noise) if one.status == "finished" else None)


def _routing(one: Trial, noise: np.random.Generator) -> dict[str, Any] | None:
    pool: list[str] = one.values.get(POOL_KEY, [])
    if not pool:
        return None
    members = [f"{name}_{pool[:i].count(name) + 1}" if name in pool[:i] else name for i, name in enumerate(pool)]
    tasks = {}
    for task in one.tasks:
        logits = noise.normal(0, 0.6, len(members))
        logits += [
            3.0 * (task == "er" and name == "hubert") + 1.0 * (task == "asr" and name == "whisper") for name in pool
        ]
        shares = np.exp(logits) / np.exp(logits).sum()
        load = {"load": dict(zip(members, map(float, shares), strict=True))}
        one_hot = {"load": {name: float(i == 0) for i, name in enumerate(members)}}
        tasks[task] = {"dependent": load, "independent": one_hot}
    return {"members": members, "datasets": {"made-up": tasks}, "training": []}


def histories(made: Sequence[Trial]) -> dict[int, History]:
    """The courses of trials, by number."""
    return {one.number: history(one) for one in made}
