"""Training steps on synthetic clips in a child process, to see whether they fit into memory.

A child that runs out of memory, in whatever way, is replaced by a fresh one: nothing left of the failed step, in an
allocator or in DeepSpeed's buffers, can disturb the next trial. Ray is not imported here: the server that children are
forked from stays small, and has no threads.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mowe_ray.config import RunConfig
from mowe_ray.config.fields import InlineConfig
from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.distributed.engine.deepspeed_engine import build_engine
from mowe_ray.model.tokenizing import train_tokenizer
from mowe_ray.training.build import DEFAULT_VOCABULARY, tokenizer_of
from mowe_ray.training.collate import collate
from mowe_ray.training.fault_tolerance.out_of_memory import is_out_of_memory
from mowe_ray.training.fault_tolerance.watchdog import ActivityTracker
from mowe_ray.training.loop import training_steps

# Fast speech has 3.5 words a second; answers to short clips are sentences too.
_WORDS_PER_S, _LEAST_WORDS, _INSTRUCTION_WORDS = 3.5, 30, 40
_WORDS = (
    *("the", "speaker", "says", "that", "rain", "fell", "over", "old", "town", "while", "a", "small", "dog", "barked"),
    *("at", "passing", "trains", "and", "somebody", "played", "piano", "behind", "an", "open", "window", "before"),
)


class TrialProcess:
    """Runs training steps in a child process, which lives until a micro-batch does not fit.

    Attributes:
        limit_bytes: Memory that the child may use; on a GPU it is known after the first trial.
    """

    def __init__(self, config: RunConfig, limit_bytes: int | None):
        # Forked from a server that has imported everything; CUDA does not survive a fork.
        gpu = config.compute.gpus_per_worker > 0
        self._context: Any = multiprocessing.get_context("spawn" if gpu else "forkserver")
        self._context.set_forkserver_preload([__name__])
        self._arguments = (config, limit_bytes)
        self._child: Any = None
        self._connection: Connection | None = None
        self.limit_bytes = limit_bytes or 0

    def run(self, clips: int, seconds: float) -> str | None:
        """Trains one step on micro-batches of so many clips; returns None if they fit, else the allocation that failed.

        Raises:
            ValueError: The model cannot be built. Other exceptions of a training step are raised as they are.
        """
        if self._connection is None:
            self._connection, theirs = self._context.Pipe()
            self._child = self._context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
            self._child.start()
            theirs.close()  # so that the child's death is the end of the stream
        try:
            self._connection.send((clips, seconds))
            answer = self._connection.recv()
        except (EOFError, ConnectionError):  # killed by the system, or ended in the middle of an allocation
            answer = self.limit_bytes, "the process died"
        if isinstance(answer, Exception):
            self.end()
            raise answer
        self.limit_bytes, failure = answer
        if failure is not None:
            self.end()
        return str(failure) if failure else None

    def end(self) -> None:
        """Ends the child, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._child.join()
            self._connection = None


def _serve(connection: Connection, config: RunConfig, limit_bytes: int | None) -> None:
    """Answers each (clips, seconds) with the limit in bytes and None, or the failed allocation if they do not fit."""
    worker: _TrialWorker | None = None
    limit = limit_bytes or 0
    while True:
        try:
            clips, seconds = connection.recv()
        except EOFError:
            return
        try:
            if worker is None:
                worker = _TrialWorker(config, limit_bytes)
                limit = worker.limit_bytes
                worker.step(1, seconds)  # the optimizer's states exist from now on
            worker.step(clips, seconds)
        except Exception as error:  # noqa: BLE001 - handed over to the parent, which raises it
            connection.send((limit, _failed_allocation(error)) if is_out_of_memory(error) else error)
            return
        connection.send((limit, None))


def _failed_allocation(error: Exception) -> str:
    """Returns the sentence of an allocator's message that names the bytes."""
    lines = [line for line in str(error).splitlines() if line]
    return lines[0].rsplit("DefaultCPUAllocator: ", 1)[-1] if lines else type(error).__name__


class _TrialWorker:
    """A worker of the run with limited memory, alone in its process group."""

    def __init__(self, config: RunConfig, limit_bytes: int | None):
        gpu = config.compute.gpus_per_worker > 0
        if not gpu:
            torch.set_num_threads(config.compute.cpus_per_worker)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed reads them
        dist.init_process_group("nccl" if gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        # Only now: gloo hangs, instead of failing, when it cannot have its threads.
        self.limit_bytes = _limit_memory(gpu, limit_bytes)
        own = isinstance(config.model.language_model, InlineConfig) and config.model.init_from is None
        tokenizer = train_tokenizer(synthetic_texts(), DEFAULT_VOCABULARY) if own else tokenizer_of(config.model, None)
        self._processor, self._engine = build_engine(config, tokenizer, ActivityTracker(), lambda _line: None)
        # With several workers the loop routes before it trains, as it does with several micro-batches.
        self._micro_batches = max(config.training.gradient_accumulation, min(2, config.compute.max_workers))

    def step(self, clips: int, seconds: float) -> None:
        """Trains one step of micro-batches of so many clips."""
        batch = collate(synthetic_batch(clips, seconds), self._processor)
        # A tiny learning rate: the weights are not to learn noise.
        steps = training_steps(self._engine, [(1, 1e-6, [batch] * self._micro_batches)], seed=0)
        for _ in steps:
            pass


def _limit_memory(gpu: bool, limit_bytes: int | None) -> int:
    """Limits the memory that this process trains in to `limit_bytes`; returns the limit."""
    if gpu:
        total = int(torch.cuda.get_device_properties(0).total_memory)
        if limit_bytes is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
        return min(total, limit_bytes or total)
    assert limit_bytes is not None
    # Allocations then fail with an error that names their size; the system would kill the process instead.
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    return limit_bytes


def synthetic_batch(clips: int, seconds: float) -> MicroBatch:
    """Returns noise of the given length with texts as long as those of fast speech of that length."""
    samples = round(seconds * SAMPLE_RATE)
    random = np.random.default_rng(clips)
    # Text counts too: logits of the answer are among the largest tensors of a step.
    answer = _text(max(_LEAST_WORDS, round(_WORDS_PER_S * seconds)))
    return MicroBatch(
        audio=random.integers(-8000, 8000, clips * samples, dtype=np.int16),
        lengths=[samples] * clips,
        scales=[2.0**-15] * clips,
        ids=[f"clip {n}" for n in range(clips)],
        instructions=[_text(_INSTRUCTION_WORDS)] * clips,
        answers=[answer] * clips,
        references=[[answer]] * clips,
        tasks=["asr"] * clips,
        sources=["synthetic"] * clips,
        bad=[],
    )


def synthetic_texts() -> list[str]:
    """Returns texts to train a tokenizer for `synthetic_batch` on."""
    return [_text(len(_WORDS))]


def _text(words: int) -> str:
    return " ".join(_WORDS[n % len(_WORDS)] for n in range(words))
