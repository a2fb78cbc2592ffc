"""Ray Data: decode samples on any CPUs, and answer them in a pool of actors that each hold the model.

The work of an evaluation, all its datasets and ablations, is one row of micro-batches: the model is loaded once a
worker. Answers come back in the planned order, whoever computed them, and are on storage as soon as they are here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from mowe_ray.config.evaluation import EvaluationConfig
from mowe_ray.data.epoch_plan import Rows
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.data.sample import BadSample
from mowe_ray.data.shards.storage import fingerprint
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.resources import decoding_options
from mowe_ray.evaluation.generation import answer_micro_batch, instruction_of
from mowe_ray.evaluation.predictions import Answer, Predictions
from mowe_ray.evaluation.targets import folder_at
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.output.terminal import duration
from mowe_ray.training.datasets import cache_folder
from mowe_ray.training.estimate import ExportCost, estimate_export

_SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class Part:
    """Samples that are answered in one way.

    Attributes:
        label: What people call it.
        index: Holds the samples.
        plan: The micro-batches, as rows of the index.
        left_out: Numbers of pool members that are treated as not there.
        predictions: Where the answers go.
        labels: The answers that exist, for instructions that list them.
    """

    label: str
    index: Index
    plan: list[Rows]
    left_out: tuple[int, ...]
    predictions: Predictions
    labels: list[str] | None = None


def inspect_export(export: str) -> ExportCost:
    """Return what a model costs, once it is sure that all its weights are there; the driver needs no model for it.

    Raises:
        ValueError: They are not, or it is no export.
    """
    try:
        found: ExportCost = ray.get(_inspect.remote(export))
    except ray.exceptions.RayTaskError as error:
        raise ValueError(cause_of(error)) from error
    return found


@ray.remote(num_cpus=1)
def _inspect(export: str) -> ExportCost:
    return estimate_export(local_copy(export))


def answer_all(export: str, parts: Sequence[Part], config: EvaluationConfig, say: Callable[[str], None]) -> None:
    """Answer what is left of all parts.

    Args:
        export: Folder or URL of the model.
        parts: What is asked.
        config: The evaluation.
        say: Shows a line of progress to the person who waits.

    Raises:
        ValueError: A worker cannot load or run the model.
    """
    for part in parts:
        part.predictions.begin()
    work = [(p, n) for p, part in enumerate(parts) for n in range(part.predictions.finished, len(part.plan))]
    if not work:
        return
    progress = _Progress(parts, work, say)
    shared = {
        "indexes": [ray.put(part.index) for part in parts],
        "plans": ray.put([part.plan for part in parts]),
    }
    ways = [(part.left_out, part.labels) for part in parts]
    try:
        for (p, _), answered in zip(work, _execute.remote(export, work, ways, shared, config), strict=True):
            table = ray.get(answered)
            _store(parts[p].predictions, table)
            progress.add(p, table)
    except ray.exceptions.RayError as error:
        raise ValueError(f"{export}: {cause_of(error)}") from error
    finally:
        for part in parts:
            part.predictions.flush()


def _store(predictions: Predictions, table: dict[str, Any]) -> None:
    answers = [Answer.from_line(line) for line in table["lines"]]
    bad = [BadSample(**fields) for fields in table["bad"]]
    predictions.add(answers, bad, audio_s=table["audio_s"], seconds=table["seconds"])


# A task of its own, because Ray Data tells the terminal of whoever starts it more than a person wants to know.
@ray.remote(num_cpus=0)
def _execute(
    export: str,
    work: list[tuple[int, int]],
    ways: list[tuple[tuple[int, ...], list[str] | None]],
    shared: dict[str, Any],
    config: EvaluationConfig,
) -> Iterator[dict[str, Any]]:
    """Yield what became of each micro-batch of `work`, in its order."""
    compute, data = config.compute, config.data
    limits = {"min_duration_s": data.min_duration_s, "max_duration_s": data.max_duration_s}
    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    # A block each: what a worker has answered is on its way to storage before it takes the next.
    dataset = ray.data.from_blocks([pa.table({"part": [p], "number": [n]}) for p, n in work])
    dataset = dataset.map_batches(
        _decode,
        fn_kwargs=shared | limits,
        compute=TaskPoolStrategy(size=data.decode_cpus * compute.max_workers),
        **decoding_options(reserved=False),
        **options,
    ).map_batches(
        _Answerer,
        fn_constructor_args=(export, config, ways),
        num_cpus=compute.cpus_per_worker,
        num_gpus=compute.gpus_per_worker,
        compute=ActorPoolStrategy(min_size=compute.min_workers, max_size=compute.max_workers),
        **({} if compute.accelerator_type is None else {"accelerator_type": compute.accelerator_type}),
        **options,
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in block.to_pylist():  # noqa: UP028 - Ray sends into what it yields from, and a list takes nothing
            yield row


def _decode(
    work: pa.Table, indexes: list[ray.ObjectRef], plans: ray.ObjectRef, min_duration_s: float, max_duration_s: float
) -> Iterator[pa.Table]:
    """Yield the decoded micro-batches of a block of work."""
    for one in work.to_pylist():
        rows = ray.get(plans)[one["part"]][one["number"]]
        batch = load_micro_batch(ray.get(indexes[one["part"]]).table.take(rows), min_duration_s, max_duration_s)
        yield batch.to_row().append_column("part", pa.array([one["part"]]))


class _Answerer:
    """Holds the model, and answers micro-batches."""

    def __init__(
        self,
        export: str,
        config: EvaluationConfig,
        ways: list[tuple[tuple[int, ...], list[str] | None]],
    ):
        self._config, self._ways = config, ways
        gpu = config.compute.gpus_per_worker > 0
        if not gpu:
            torch.set_num_threads(config.compute.cpus_per_worker)
        folder = local_copy(export)
        model = MoweForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16 if gpu else torch.float32)
        self._model: MoweForConditionalGeneration = model.to("cuda" if gpu else "cpu").eval()
        self._processor: MoweProcessor = MoweProcessor.from_pretrained(folder)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Answer the micro-batches of a table; returns lines of JSON, and what they took."""
        return pa.Table.from_pylist([self._answer(decoded, row) for row in range(decoded.num_rows)], schema=_ANSWERED)

    @torch.inference_mode()
    def _answer(self, decoded: pa.Table, row: int) -> dict[str, Any]:
        config, micro_batch = self._config, MicroBatch.from_row(decoded, row)
        self._model.audio_tower.left_out, labels = self._ways[decoded["part"][row].as_py()]
        began = time.monotonic()
        answers = answer_micro_batch(
            self._model,
            self._processor,
            micro_batch,
            **config.generation.model_dump(exclude={"instruction"}),
            batch_seconds=config.data.batch_seconds,
            max_batch_size=config.data.max_batch_size,
            instruct=partial(_usual_instruction, config, labels),
        )
        return {
            "lines": [answer.to_line() for answer in answers],
            "bad": [{k: getattr(bad, k) for k in ("id", "source", "cause", "detail")} for bad in micro_batch.bad],
            "audio_s": sum(answer.duration_s for answer in answers),
            "seconds": time.monotonic() - began,
        }


def _usual_instruction(config: EvaluationConfig, labels: list[str] | None, task: str, sample_id: str) -> str | None:
    drawn = config.generation.instruction == "task"
    return instruction_of(task, sample_id, labels, config.seed) if drawn else None


_BAD = pa.struct([(name, pa.string()) for name in ("id", "source", "cause", "detail")])
_ANSWERED = pa.schema(
    [("lines", pa.list_(pa.string())), ("bad", pa.list_(_BAD)), ("audio_s", pa.float64()), ("seconds", pa.float64())]
)


def local_copy(export: str) -> str:
    """Return a local folder with an export: its own, or a copy of a URL's, made once a machine and version."""
    if "://" not in export:
        return export
    folder = folder_at(export)
    versions = {name: fingerprint(folder.path(name)) for name in folder.names("")}
    key = hashlib.sha256(json.dumps([export, versions]).encode()).hexdigest()[:16]
    copy = cache_folder() / "exports" / key
    if not copy.exists():
        part = copy.with_name(f"{key}.{uuid.uuid4().hex}.part")
        part.mkdir(parents=True)
        for name in versions:
            folder.fetch(name, part / name)
        with contextlib.suppress(OSError):  # another process was faster
            part.replace(copy)
        shutil.rmtree(part, ignore_errors=True)
    return str(copy)


class _Progress:
    """Tells how far the answering is."""

    def __init__(self, parts: Sequence[Part], work: list[tuple[int, int]], say: Callable[[str], None]):
        self._parts, self._say = parts, say
        self._rows = [len(parts[p].plan[n]) for p, n in work]
        self._done, self._audio_s = 0, 0.0
        self._began = self._said = time.monotonic()

    def add(self, part: int, answered: dict[str, Any]) -> None:
        """Count a micro-batch."""
        now = time.monotonic()
        self._done += 1
        if self._done == 1:  # until now the model was loaded, which takes no longer for more samples
            self._began = now
        else:
            self._audio_s += answered["audio_s"]
        last = self._done == len(self._rows)
        if now - self._said < _SAY_EVERY_S and not last:
            return
        self._said, rows, total = now, sum(self._rows[: self._done]), sum(self._rows)
        spent, timed = now - self._began, rows - self._rows[0]
        rate = f": {self._audio_s / spent:,.1f} audio-s/s" if timed else ""
        left = f", {duration(spent * (total - rows) / timed)} left" if timed and not last else ""
        self._say(f"answered {rows}/{total}, now {self._parts[part].label}{rate}{left}")
