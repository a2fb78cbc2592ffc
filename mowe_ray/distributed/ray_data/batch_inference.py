"""Batch inference of an evaluation: decode samples on any CPUs, answer them in actors that each hold the model.

All datasets and ablations of an evaluation are one sequence of micro-batches, so each actor loads the model once.
Answers arrive in the planned order, whichever actor computed them, and are written to storage as they arrive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch

from mowe_ray.config.evaluation import EvaluationConfig
from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.epoch_plan import Rows
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import BadSample
from mowe_ray.data.shards.compressed import cache_folder
from mowe_ray.data.shards.storage import fingerprint
from mowe_ray.distributed.errors import cause_of
from mowe_ray.distributed.ray_data.decode_tasks import decode_micro_batches
from mowe_ray.distributed.ray_data.pipeline import ModelActors, stream_blocks
from mowe_ray.evaluation.chat_endpoint import ChatEndpoint
from mowe_ray.evaluation.generation import answer_micro_batch, instruction_of, instructions_of
from mowe_ray.evaluation.positions import drop_too_long
from mowe_ray.evaluation.predictions import Answer, Predictions
from mowe_ray.evaluation.served_answers import ask_server
from mowe_ray.evaluation.targets import Target, folder_at
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.output.terminal import ProgressReporter
from mowe_ray.training.build import model_dtype
from mowe_ray.training.estimate import ExportCost, estimate_export


@dataclass(frozen=True)
class AnswerJob:
    """A dataset to answer, with the complete model or without some of its pool members.

    Attributes:
        label: Name in progress messages.
        index: The index that holds the samples.
        plan: Rows of the index in each micro-batch.
        excluded_members: Indexes of the pool members that are treated as absent (ablation).
        predictions: Receives the answers.
        labels: The possible answers of a classification, for instructions that list them.
    """

    label: str
    index: Index
    plan: list[Rows]
    excluded_members: tuple[int, ...]
    predictions: Predictions
    labels: list[str] | None = None


def inspect_export(export: str, config: EvaluationConfig) -> ExportCost:
    """Returns what a model costs, after a check that all its weights exist; a task reads them, not this process.

    Raises:
        ValueError: Weights are missing, or the folder is no export.
    """
    try:
        cost: ExportCost = ray.get(_inspect.remote(export, config))
    except ray.exceptions.RayTaskError as error:
        raise ValueError(cause_of(error)) from error
    return cost


@ray.remote(num_cpus=1)
def _inspect(export: str, config: EvaluationConfig) -> ExportCost:  # which brings the plugins along
    return estimate_export(local_copy(export))


def answer_all(target: Target, jobs: Sequence[AnswerJob], config: EvaluationConfig, log: Callable[[str], None]) -> None:
    """Answers the samples of all jobs that have no stored answer yet.

    Args:
        target: The model.
        jobs: The datasets to answer.
        config: The evaluation.
        log: Called with each line of progress.

    Raises:
        ValueError: A worker cannot load or run the model, or no answer comes.
    """
    for job in jobs:
        job.predictions.begin()
    work = [(n, number) for n, job in enumerate(jobs) for number in range(job.predictions.finished, len(job.plan))]
    if not work:
        return
    rows = [len(jobs[n].plan[number]) for n, number in work]
    progress = ProgressReporter("answering", sum(rows), unit="samples", log=log)
    datasets = {"indexes": [ray.put(job.index) for job in jobs], "plans": ray.put([job.plan for job in jobs])}
    # Small, and known to every actor from the start: blocks only carry the number of their job.
    settings = [(job.excluded_members, job.labels) for job in jobs]
    try:
        results = _execute.remote(target, work, settings, datasets, config)
        for i, ((n, number), size) in enumerate(zip(work, rows, strict=True)):
            _store(jobs[n], number, _next(results, config.timeout_s))
            progress.label = f"answering, now {jobs[n].label}"
            progress.advance(size)
            if i == 0:  # until now the model was loaded, which takes no longer for more samples
                progress.restart()
        progress.finish()
    except ray.exceptions.RayError as error:
        raise ValueError(f"{target.export}: {cause_of(error)}") from error
    finally:
        for job in jobs:
            job.predictions.close()


def _next(results: ray.ObjectRefGenerator, timeout_s: float) -> dict[str, Any]:
    ready, _ = ray.wait([results], timeout=timeout_s)
    if not ready:
        raise ValueError(
            f"no answer has come for {timeout_s:g} s (timeout_s): the model, the audio or the cluster keeps it back; "
            "run the same command again to go on"
        )
    answered: dict[str, Any] = ray.get(next(results), timeout=timeout_s)
    return answered


def _store(job: AnswerJob, number: int, answered: dict[str, Any]) -> None:
    places = places_of(job.index, job.plan[number])
    answers = [replace(answer, **places[answer.id]) for answer in map(Answer.from_line, answered["lines"])]
    bad = [BadSample(**fields) for fields in answered["bad"]]
    job.predictions.add(answers, bad, audio_s=answered["audio_s"], seconds=answered["seconds"])


_PLACE = ["audio_at", "audio_size", "meta_at", "meta_size", "parts"]


def places_of(index: Index, rows: Rows) -> dict[str, dict[str, Any]]:
    """Returns `shard` and `place` of an `Answer` for rows of an index, by id."""
    columns = index.table.select(["id", "shard", *_PLACE]).take(rows).to_pylist()
    return {row.pop("id"): {"shard": row.pop("shard"), "place": row} for row in columns}


# A task of its own, because Ray Data writes much to the terminal of the process that starts it.
@ray.remote(num_cpus=0)
def _execute(
    target: Target,
    work: list[tuple[int, int]],
    settings: list[tuple[tuple[int, ...], list[str] | None]],
    datasets: dict[str, Any],
    config: EvaluationConfig,
) -> Iterator[dict[str, Any]]:
    """Yields the answers to each micro-batch of `work`, in its order.

    Args:
        work: Pairs of a job and of a micro-batch of its plan.
        settings: Excluded members and labels of each job.
        datasets: Indexes and plans of the jobs, in the object store.
    """
    data = config.data
    arguments = {
        **datasets,
        "cache": None,
        "min_duration_s": data.min_duration_s,
        "max_duration_s": data.max_duration_s,
        "storage_timeout_s": data.storage_timeout_s,
    }
    blocks = stream_blocks(
        # A block each: what a worker has answered is on its way to storage before it takes the next.
        [pa.table({"dataset": [job], "number": [number]}) for job, number in work],
        decode_micro_batches,
        arguments,
        decode_cpus=data.decode_cpus * config.compute.max_workers,
        preserve_order=True,
        actors=ModelActors(_Answerer, {"target": target, "config": config, "settings": settings}, config.compute),
    )
    for block in blocks:
        for row in block.to_pylist():  # noqa: UP028 - Ray sends into what it yields from, and a list takes nothing
            yield row


class _Answerer:
    """Answers micro-batches; one actor of the pipeline."""

    def __init__(
        self,
        target: Target,
        config: EvaluationConfig,
        settings: list[tuple[tuple[int, ...], list[str] | None]],
    ):
        self._config, self._settings = config, settings
        self._model = _Loaded(target.export, config) if target.served_as is None else _Served(target, config)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Answers the micro-batches of a table; returns a row of `_ANSWERED` for each."""
        return pa.Table.from_pylist([self._answer(decoded, row) for row in range(decoded.num_rows)], schema=_ANSWERED)

    def _answer(self, decoded: pa.Table, row: int) -> dict[str, Any]:
        excluded, labels = self._settings[decoded["dataset"][row].as_py()]
        began = time.monotonic()
        instruct = partial(_task_instruction, self._config, labels)
        answers, micro_batch = self._model.answer(MicroBatch.from_row(decoded, row), excluded, instruct)
        return {
            "lines": [answer.to_line() for answer in answers],
            "bad": [{k: getattr(bad, k) for k in ("id", "source", "cause", "detail")} for bad in micro_batch.bad],
            "audio_s": sum(answer.duration_s for answer in answers),
            "seconds": time.monotonic() - began,
        }


class _Loaded:
    """A model in this process."""

    def __init__(self, export: str, config: EvaluationConfig):
        self._config = config
        gpu = config.compute.gpus_per_worker > 0
        if not gpu:
            torch.set_num_threads(config.compute.cpus_per_worker)
        folder = local_copy(export)
        model = MoweForConditionalGeneration.from_pretrained(folder, dtype=model_dtype(config.generation, gpu))
        self._model: MoweForConditionalGeneration = model.to("cuda" if gpu else "cpu").eval()
        self._processor: MoweProcessor = MoweProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def answer(
        self, micro_batch: MicroBatch, excluded: tuple[int, ...], instruct: Callable[[str, str], str | None]
    ) -> tuple[list[Answer], MicroBatch]:
        config = self._config
        self._model.audio_tower.excluded_members = excluded
        micro_batch = drop_too_long(
            micro_batch,
            self._processor,
            max_text_tokens=config.data.max_text_tokens,
            instructions=instructions_of(micro_batch, instruct),
            new_tokens=config.generation.max_new_tokens,
            max_samples=round(config.generation.max_audio_s * SAMPLE_RATE),
        )
        answers = answer_micro_batch(
            self._model,
            self._processor,
            micro_batch,
            **config.generation.model_dump(exclude={"instruction", "dtype"}),
            batch_seconds=config.data.batch_seconds,
            max_batch_size=config.data.max_batch_size,
            instruct=instruct,
        )
        return answers, micro_batch


class _Served:
    """A model behind a server."""

    def __init__(self, target: Target, config: EvaluationConfig):
        assert target.served_as is not None
        self._generation = config.generation
        self._endpoint = ChatEndpoint(
            target.export,
            target.served_as,
            **config.server.model_dump(),
            max_tokens=config.generation.max_new_tokens,
            section="server",
        )

    def answer(
        self, micro_batch: MicroBatch, excluded: tuple[int, ...], instruct: Callable[[str, str], str | None]
    ) -> tuple[list[Answer], MicroBatch]:
        limits = self._generation.model_dump(include={"max_audio_s", "chunked_tasks"})
        return ask_server(self._endpoint, micro_batch, **limits, instruct=instruct)


def _task_instruction(config: EvaluationConfig, labels: list[str] | None, task: str, sample_id: str) -> str | None:
    drawn = config.generation.instruction == "task"
    return instruction_of(task, sample_id, labels, config.seed) if drawn else None


_BAD = pa.struct([(name, pa.string()) for name in ("id", "source", "cause", "detail")])
_ANSWERED = pa.schema(
    [("lines", pa.list_(pa.string())), ("bad", pa.list_(_BAD)), ("audio_s", pa.float64()), ("seconds", pa.float64())]
)


def local_copy(export: str) -> str:
    """Returns a local folder with an export: itself, or a copy of the URL, made once per machine and version."""
    if "://" not in export:
        return export
    folder = folder_at(export)
    # A run that is trained again writes its export to the same URL.
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
