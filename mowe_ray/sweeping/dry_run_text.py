"""The plan of a study as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from mowe_ray.output.text import amount, duration, write_table
from mowe_ray.sweeping.work import CLIP_S

# Of more trials, the first and the last ones are shown.
_SHOWN = 40


def write_plan(facts: dict[str, Any], out: TextIO) -> None:
    """Write the facts that `dry_run` returns."""
    out.write(f"{facts['question']}\n")
    write_table(out, _setting(facts))
    out.write("\nspace\n")
    constraints = [["only where", " and ".join(facts["constraints"])]] if facts["constraints"] else []
    write_table(out, [[name, _entry(values)] for name, values in facts["space"].items()] + constraints)
    if facts["planned"]:
        out.write(f"\n{facts['trials']} trials: parameters, GFLOPs of a forward pass over {CLIP_S:g} s, training\n")
        write_table(out, [["", "seed", "stored", "active", "GFLOPs", "training", "", ""], *_trials(facts["planned"])])
    out.write("\ncost\n")
    write_table(out, _costs(facts))
    out.write(
        "  training counts as 3 forward passes; text, validation and start-up come on top, frozen parts need less\n"
    )


def _setting(facts: dict[str, Any]) -> list[list[str]]:
    resources, objective = facts["resources"], facts["objective"]
    each = f"{resources['cpus_per_worker']} CPU to train, {resources['decode_cpus_per_worker']} to decode"
    if resources["gpus_per_worker"]:
        each += f", 1 GPU ({resources['accelerator_type'] or 'any'})"
    workers, concurrent = resources["workers"], resources["concurrent"]
    against = f", against {objective['against']}" if objective["against"] else ""
    return [
        ["base", facts["base"]],
        ["search", f"{facts['search']}, {facts['points']} points"],
        ["scheduler", facts["scheduler"]],
        ["objective", objective["metric"] + against],
        ["seeds", ", ".join(map(str, facts["seeds"]))],
        ["a trial", f"{workers} worker{'s' if workers > 1 else ''}, each {each}"],
        ["at a time", "as many as fit" if concurrent is None else str(concurrent)],
    ]


def _entry(values: dict[str, Any]) -> str:
    if "bounds" in values:
        low, high = values["bounds"]
        return f"{low:g} to {high:g}{', every factor alike' if values['log'] else ''}"
    found = values["values"]
    if any(isinstance(value, list) for value in found):
        return f"{len(found)} pools"
    return ", ".join(map(str, found))


def _trials(planned: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [
            trial["name"],
            str(trial["seed"]),
            amount(trial["stored"]),
            amount(trial["active"]),
            _number(trial["gflops"]),
            _operations(trial["pflop"]),
            "" if trial["status"] == "waiting" else trial["status"],
            trial["label"],
        ]
        for trial in planned
    ]
    half = _SHOWN // 2
    return rows if len(rows) <= _SHOWN else [*rows[:half], [f"... {len(rows) - _SHOWN} more ..."], *rows[-half:]]


def _costs(facts: dict[str, Any]) -> list[list[str]]:
    cost, time, data = facts["cost"], facts["time"], facts["data"]
    most = "at most " if cost["at_most"] else ""
    earlier = ", ".join(f"{count} {status}" for status, count in facts["earlier"].items())
    hours, pflop, device_h = cost["audio_h_per_trial"], cost["pflop"], time["device_h_left"]
    rows = [
        ["trials", f"{facts['trials']}{f', of them {earlier}' if earlier else ''}"],
        ["data.train", "none given" if data is None else f"{data['clips']:,.0f} clips, {data['hours']:.3g} h an epoch"],
        ["audio", _unless_unknown(hours, f"{most}{hours or 0:.3g} h a trial")],
        [
            "training",
            _unless_unknown(pflop, f"{most}{_operations(pflop)}, {_operations(cost['pflop_per_trial'])} a trial"),
        ],
    ]
    spent = f"{most}{duration(3600 * (device_h or 0))}, {duration(3600 * (time['device_h_per_trial'] or 0))} a trial"
    if time["measured_from"]:
        count = time["measured_from"]
        rows.append(
            ["time left", f"{spent}, of all workers; measured, {count} trial{'s' if count > 1 else ''} finished"]
        )
    else:
        rows.append([f"{time['device']['name']} time", _unless_unknown(device_h, spent)])
        rows.append(["", f"at {time['device']['source']}"])
    return rows


def _unless_unknown(value: float | None, told: str) -> str:
    return "unknown" if value is None else told


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _operations(pflop: float | None) -> str:
    """Write a number of operations."""
    if pflop is None:
        return "unknown"
    unit, size = next(
        ((u, s) for u, s in (("EFLOP", 1e3), ("PFLOP", 1.0), ("TFLOP", 1e-3)) if pflop >= s), ("GFLOP", 1e-6)
    )
    return f"{pflop / size:.3g} {unit}"
