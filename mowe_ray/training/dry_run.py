"""The dry run of a training run: its sizes, memory, data and steps, without weights, accelerator or cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TextIO

import pyarrow.compute as pc

from mowe_ray.config import RunConfig
from mowe_ray.data.epoch_plan import count_samples
from mowe_ray.data.index import Index
from mowe_ray.data.scan import map_in_child
from mowe_ray.model.cost import zero_memory_bytes
from mowe_ray.output.terminal import byte_size, format_table
from mowe_ray.training.build import model_dtype
from mowe_ray.training.clip_length import check_clip_length
from mowe_ray.training.datasets import Sources, check_sources, scan_sources
from mowe_ray.training.estimate import Estimate, PartCost, estimate
from mowe_ray.training.flops import CLIP_S
from mowe_ray.training.sampler import EpochSampler
from mowe_ray.training.useful_work import TrainingWork


def dry_run(config: RunConfig, out: TextIO) -> dict[str, Any]:
    """Write tables of sizes, work, memory, data and steps to `out`; return the same numbers.

    Args:
        config: The run.
        out: Stream for the tables.

    Raises:
        ValueError: A checkpoint or the data cannot be used. The tables before it have been written.
    """
    costs = estimate(config.model)
    model = _model_facts(costs)
    _write(out, f"model, and GFLOPs of the forward pass over one clip of {CLIP_S:g} s", _model_table(costs))
    _write_lines(out, _model_notes(costs))
    memory = _memory_facts(config, costs.total)
    _write(out, _memory_title(config, memory), _memory_table(memory))
    _write_lines(
        out, ["activations come on top", *(["optimizer: on the CPU"] if config.compute.offload == "cpu" else [])]
    )
    sources = scan_sources(config.data, map_in_child, seed=config.seed) if config.data.train else None
    data = {} if sources is None else _data_facts(sources)
    _write(out, "data", _data_table(data) if sources else [["data.train: none given"]])
    _write_lines(out, ["dropped: by headers, decoding may find more"] if sources else [])
    steps = _step_facts(config, sources.train if sources else None)
    _write(out, "steps", [[key.replace("_", " "), _format_value(value)] for key, value in steps.items()])
    check_clip_length(config.model, config.data.max_duration_s)
    work = _work_facts(config, costs, sources.train) if steps["steps_per_epoch"] and sources else None
    _write(out, "work: share of the floating-point operations that an epoch executes", _work_table(work, costs))
    if sources is not None:
        check_sources(config.data, sources)
        data |= {"profiles": sources.report.profiles}
        _write(out, "samples, of those that were tried", _profile_table(sources.report.profiles))
        _write_lines(out, [f"warning: {line}" for line in sources.report.warnings])
    return {"run": config.name, "model": model, "memory": memory, "data": data, "steps": steps, "work": work}


def _model_facts(costs: Estimate) -> dict[str, Any]:
    def facts(part: PartCost) -> dict[str, Any]:
        return {
            "name": part.name,
            "stored": None if part.weights is None else int(part.weights.total),
            "trainable": part.trainable,
            "active": None if part.weights is None else [int(n) for n in part.weights.active(costs.running)],
            "gflops_active": None if part.gflops is None else list(part.gflops.active(costs.running)),
            "gflops_dense": None if part.gflops is None else part.gflops.total,
            "needs": list(part.needs),
        }

    total = costs.total
    assert total.weights is not None
    assert total.gflops is not None
    return {
        "parts": [facts(part) for part in costs.parts],
        "total": facts(total),
        "active_expected": round(total.weights.expected(costs.expected_share)),
        "gflops_expected": total.gflops.expected(costs.expected_share),
        "audio_tokens": costs.audio_tokens,
        "left_out": [f"{part.name} ({', '.join(part.needs)})" for part in costs.parts if part.needs] + costs.notes,
    }


def _model_table(costs: Estimate) -> list[list[str]]:
    rows = [["part", "stored", "active per clip", "trainable", "GFLOPs active", "GFLOPs dense", ""]]
    for part in [*costs.parts, costs.total]:
        if part.weights is None:
            rows.append([part.name, *[""] * 5, f"unknown (needs {', '.join(part.needs)})"])
            continue
        work = ["", ""]
        if part.gflops is not None:
            work = [_range(part.gflops.active(costs.running), _gflops), _gflops(part.gflops.total)]
        rows.append(
            [
                part.name,
                _count(part.weights.total),
                _range(part.weights.active(costs.running), _count),
                _count(part.trainable or 0),
                *work,
            ]
        )
    return rows


def _model_notes(costs: Estimate) -> list[str]:
    total, (fewest, most) = costs.total, costs.running
    assert total.weights is not None
    assert total.gflops is not None
    members = sum(part.name.startswith("weak_encoders.") for part in costs.parts)
    notes = []
    if members:
        number = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        notes.append(
            f"{number} of {members} weak encoders run per clip; expected while the routers are undecided: "
            f"{_count(total.weights.expected(costs.expected_share))} weights, "
            f"{_gflops(total.gflops.expected(costs.expected_share))} GFLOPs"
        )
    if any(part.name == "lora" for part in costs.parts):
        notes.append("lora: its GFLOPs count with the modules it is in")
    if costs.audio_tokens is not None:
        fusion = costs.model.audio_tower.fusion
        latents = f" ({fusion.tokens} latents of the pool)" if fusion is not None and fusion.tokens else ""
        notes.append(f"language_model: {costs.audio_tokens} audio tokens{latents}, text comes on top")
    if costs.unknown:
        notes.append(f"the totals leave out {', '.join(costs.unknown)}, and what only they decide")
    return notes + costs.notes


def _memory_facts(config: RunConfig, total: PartCost) -> dict[str, Any]:
    assert total.weights is not None
    assert total.trainable is not None
    compute, frozen = config.compute, int(total.weights.total) - total.trainable
    dtype = model_dtype(config.model, compute.gpus_per_worker > 0)
    stages = {
        str(stage): zero_memory_bytes(
            total.trainable, frozen, stage, compute.min_workers, dtype.itemsize, float32_sums=True
        )
        for stage in range(4)
    }
    return {"dtype": str(dtype).removeprefix("torch."), "zero_stage": compute.zero_stage, "bytes_per_worker": stages}


def _memory_title(config: RunConfig, memory: dict[str, Any]) -> str:
    workers = config.compute.min_workers  # the fewest: they hold the largest shards
    return f"memory per worker, of {workers} worker{'s' if workers > 1 else ''}, {memory['dtype']}"


def _memory_table(memory: dict[str, Any]) -> list[list[str]]:
    rows = [["ZeRO stage", "weights", "gradients", "optimizer", "total", ""]]
    for stage, parts in memory["bytes_per_worker"].items():
        used = "<- compute.zero_stage" if int(stage) == memory["zero_stage"] else ""
        rows.append([stage, *(byte_size(parts[key]) for key in ("weights", "gradients", "optimizer", "total")), used])
    return rows


def _data_facts(sources: Sources) -> dict[str, Any]:
    """Return samples, hours, tasks and causes of loss by source name."""
    reported = sources.report.to_json()["sources"]
    facts: dict[str, Any] = {}
    for use, index in [("train", sources.train), *(("validation", index) for index in sources.validation.values())]:
        for number, name in enumerate(index.source_names):
            rows = index.table.filter(index.sources == number)
            facts[name] = {
                "use": use,
                "samples": rows.num_rows,
                "hours": float(pc.sum(rows["duration_s"]).as_py() or 0.0) / 3600,
                "tasks": {entry["values"]: entry["counts"] for entry in pc.value_counts(rows["task"]).to_pylist()},
                "text_only": index.text_only_per_source[name],
                "dropped": reported[name]["causes"],
            }
    return facts


def _data_table(data: dict[str, Any]) -> list[list[str]]:
    rows = [["source", "use", "samples", "text only", "hours", "tasks", "dropped"]]
    for name, facts in data.items():
        tasks, dropped = (
            ", ".join(f"{value} {key}" for key, value in facts[field].items()) for field in ("tasks", "dropped")
        )
        samples, text_only = (f"{facts[field]:,}" for field in ("samples", "text_only"))
        rows.append([name, facts["use"], samples, text_only, f"{facts['hours']:.2f}", tasks, dropped or "nothing"])
    return rows


def _profile_table(profiles: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = [["source", "tried", "rates (Hz)", "channels", "answer words", "lengths", "shortest (s)", "longest (s)"]]
    for name, facts in profiles.items():
        counts = [_counted(facts.get(field, {})) for field in ("sample_rates", "channels")]
        words = " to ".join(map(str, facts.get("answer_words", [])[::2]))
        extremes = [", ".join(f"{row} {s:g}" for row, s in facts[field]) for field in ("shortest", "longest")]
        rows.append(
            [name, str(facts.get("tried", 0)), *counts, words, _counted(facts["duration_histogram"]), *extremes]
        )
    return rows


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {value}" for value, count in counts.items())


def _step_facts(config: RunConfig, train: Index | None) -> dict[str, Any]:
    """Return the size and number of optimizer steps; None where they depend on data that are not given."""
    training, data = config.training, config.data
    micro_batches = config.micro_batches_per_step
    facts: dict[str, Any] = {
        "micro_batches_per_step": micro_batches,
        "padded_audio_s_per_step_at_most": micro_batches * data.batch_seconds,
        "clips_per_step_at_most": micro_batches * data.max_batch_size,
        "audio_s_per_step": None,
        "steps_per_epoch": None,
        "total_steps": training.max_steps,
    }
    weights = [source.weight for source in data.train]
    if train is None or not count_samples([*train.samples_per_source.values()], weights):
        return facts
    sampler = _sampler(config, train)
    durations = train.durations
    seconds = [sum(float(durations[rows].sum()) for rows in planned.micro_batches) for planned in sampler(epochs=1)]
    return facts | {
        "audio_s_per_step": sum(seconds) / len(seconds),
        "steps_per_epoch": len(seconds),
        "total_steps": training.max_steps or sum(1 for _ in sampler(epochs=training.epochs)),
    }


def _sampler(config: RunConfig, train: Index) -> Callable[..., EpochSampler]:
    micro_batches = config.micro_batches_per_step
    return partial(EpochSampler, train, config.data, seed=config.seed, micro_batches_per_step=micro_batches)


def _work_facts(config: RunConfig, costs: Estimate, train: Index) -> dict[str, float] | None:
    """Return the shares of an epoch's work by what it is spent on; None where a part of the model is unknown."""
    if costs.unknown:
        return None
    durations = train.durations
    counted = TrainingWork(costs.model, max_s=float(durations.max()), recomputed=config.model.gradient_checkpointing)
    steps = (planned.micro_batches for planned in _sampler(config, train)(epochs=1))
    work, balance = counted.planned(steps, durations, config.compute.min_workers)
    shares = {cause: gflops / work.executed for cause, gflops in vars(work).items()}
    return {"useful": work.useful_share, **shares, "balance_of_workers": balance}


_WORK_ROWS = {
    "useful": "what each clip and row takes alone",
    "encoder_padding": "of this, silence behind a clip (model.pad_audio)",
    "batch_padding": "up to the longest clip of a micro-batch",
    "row_padding": "up to the longest row of the language model, audio only: texts are not read here",
    "idle": "entries without audio",
    "balance_of_workers": "mean work of the workers in a step / of the one that all wait for",
}


def _work_table(work: dict[str, float] | None, costs: Estimate) -> list[list[str]]:
    if work is None:
        return [[f"unknown (needs {', '.join(costs.unknown) or 'data.train'})"]]
    return [[name.replace("_", " "), f"{work[name]:.3f}", meaning] for name, meaning in _WORK_ROWS.items()]


def _write(out: TextIO, title: str, rows: Sequence[Sequence[str]]) -> None:
    out.write(f"\n{title}\n")
    out.write(format_table(rows))


def _write_lines(out: TextIO, lines: Sequence[str]) -> None:
    for line in lines:
        out.write(f"  {line}\n")


def _format_value(value: float | None) -> str:
    return (
        "unknown (needs data.train)" if value is None else f"{value:,.10g}" if value == int(value) else f"{value:,.1f}"
    )


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _gflops(number: float) -> str:
    return f"{number:,.1f}" if number >= 0.1 or number == 0 else f"{number:.2g}"


def _range(ends: tuple[float, float], write: Callable[[float], str]) -> str:
    low, high = (write(end) for end in ends)
    return low if low == high else f"{low} to {high}"
