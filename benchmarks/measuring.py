"""Shared by the benchmarks: interleaved rounds of measurements, and results as a table and as JSON."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Check:
    """A ratio and its target, an upper or a lower limit."""

    name: str
    ratio: float
    target: float
    at_most: bool = True

    @property
    def passed(self) -> bool:
        """Whether the ratio meets the target."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure all contenders in every round, every other round backwards: a busy machine slows all of them alike."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        order = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
        for name in order:
            measured[name].append(contenders[name]())
    return measured


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of all threads of this process in `run`, which other processes do not lengthen."""
    began = time.process_time()
    run()
    return time.process_time() - began


def wall_seconds(run: Callable[[], object]) -> float:
    """Return the time `run` took on the clock on the wall: for what threads and disks do on the way."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def ratio(ours: list[float], reference: list[float]) -> float:
    """Return the median over rounds of ours / reference: both of a round met the same machine."""
    return statistics.median(a / b for a, b in zip(ours, reference, strict=True))


def conclude(benchmark: str, table: Mapping[str, str], checks: list[Check], **facts: object) -> int:
    """Print the table, each check and, as the last line, JSON; returns the exit code."""
    width = max(len(name) for name in [*table, *(check.name for check in checks)])
    for name, value in table.items():
        print(f"{name:<{width}}  {value}")
    for check in checks:
        bound = "at most" if check.at_most else "at least"
        verdict = "ok" if check.passed else "MISSED"
        print(f"{check.name:<{width}}  {check.ratio:.3f}  ({bound} {check.target:g}: {verdict})")
    passed = all(check.passed for check in checks)
    results = [{**asdict(check), "ratio": round(check.ratio, 4), "pass": check.passed} for check in checks]
    print(json.dumps({"benchmark": benchmark, "checks": results, "pass": passed, **facts}))
    return 0 if passed else 1
