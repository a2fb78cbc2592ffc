"""Dynamic batching: questions that wait are answered together when they agree in length and settings."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

import torch

from mowe_ray.serving.question import Piece, Question, Refused, Reply
from mowe_ray.serving.served_model import Listener, ServedModel

# A clip may be padded to this many times its length.
_MOST_PADDING = 2.0
# What is shorter is batched as if it were so long: it costs little anyway.
_SHORT_S = 4.0


class Backend(Protocol):
    """Who answers: this process, or replicas elsewhere."""

    def models(self) -> dict[str, list[str]]:
        """Return the names of the pool members by model."""

    def answer(self, model: str, question: Question) -> AsyncIterator[Piece | Reply]:
        """Yield the pieces of an answer if they are asked for, then the reply.

        To close the iterator gives the question up.
        """


class Batcher:
    """Answers questions in one thread, oldest first, together with those that go with it.

    Args:
        model: Answers them.
        max_batch_size: Questions that are answered together.
        batch_seconds: Audio that goes through the encoders together, padding included, in seconds.
        wait_s: How long a question waits for company.
    """

    def __init__(
        self, model: ServedModel, *, max_batch_size: int = 16, batch_seconds: float = 240.0, wait_s: float = 0.02
    ):
        self._model = model
        self._max_batch_size, self._batch_seconds, self._wait_s = max_batch_size, batch_seconds, wait_s
        self._waiting: deque[Listener] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    async def answer(self, question: Question) -> AsyncIterator[Piece | Reply]:
        """Yield the pieces of an answer if they are asked for, then the reply; closed early, it frees its place.

        Raises:
            Refused: The question cannot be asked.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Piece | Reply | Exception]()
        question = await loop.run_in_executor(None, self._model.check, question)
        listener = Listener(question, lambda event: _call_soon(loop, events, event), self._model.padding(question))
        with self._changed:
            self._waiting.append(listener)
            self._changed.notify()
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Reply):
                    return
        finally:
            listener.gone = True

    def is_alive(self) -> bool:
        """Whether questions are still answered."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread once its batch is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)

    def _answer(self, batch: list[Listener]) -> None:
        try:
            self._model.answer(batch)
        except Exception as error:  # noqa: BLE001 - whatever a model raises is that of its questions, not of the server
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(batch) > 1:
                for listener in batch:
                    self._answer([listener])
                return
            batch[0].on_event(Refused(f"the model failed: {error}", status=500, code="server_error"))

    def _next_batch(self) -> list[Listener]:
        """Wait for questions; returns those to answer together, none when it is over."""
        with self._changed:
            while True:
                self._waiting = deque(listener for listener in self._waiting if not listener.gone)
                if self._closed:
                    return []
                if not self._waiting:
                    self._changed.wait()
                    continue
                patience = self._waiting[0].asked_at + self._wait_s - time.monotonic()
                batch = self._company()
                if patience <= 0 or len(batch) == self._max_batch_size:
                    self._waiting = deque(listener for listener in self._waiting if listener not in batch)
                    return batch
                self._changed.wait(patience)

    def _company(self) -> list[Listener]:
        """Return the oldest question and those that can be answered with it."""
        first = self._waiting[0]
        batch, padding = [first], first.padding
        shortest = longest = max(first.question.longest_s, _SHORT_S)
        if first.question.sampling.temperature > 0:
            return batch  # a seed is for one answer
        for listener in list(self._waiting)[1:]:
            question = listener.question
            seconds = max(question.longest_s, _SHORT_S)
            low, high = min(shortest, seconds), max(longest, seconds)
            clips = sum(len(other.question.clips) for other in batch) + len(question.clips)
            if (
                len(batch) < self._max_batch_size
                and (question.without, question.sampling) == (first.question.without, first.question.sampling)
                and (listener.padding == padding or not question.clips or not padding)
                and high <= _MOST_PADDING * low
                and clips * high <= self._batch_seconds
            ):
                batch.append(listener)
                padding = padding or listener.padding
                shortest, longest = low, high
        return batch


def _call_soon(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Piece | Reply | Exception], event: Piece | Reply | Exception
) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


class LocalBackend:
    """Models in this process."""

    def __init__(self, batchers: dict[str, tuple[ServedModel, Batcher]]):
        self._batchers = batchers

    def models(self) -> dict[str, list[str]]:
        """Return the names of the pool members by model."""
        return {name: model.members for name, (model, _) in self._batchers.items()}

    def answer(self, model: str, question: Question) -> AsyncIterator[Piece | Reply]:
        """Yield the pieces of an answer if they are asked for, then the reply."""
        return self._batchers[model][1].answer(question)
