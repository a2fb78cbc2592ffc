"""Answers of a model behind an OpenAI-compatible server: each clip is asked about in a chat with audio."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import soundfile

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.data.sample import CLIP, BadAudio, Turn
from mowe_ray.evaluation.chat_endpoint import ChatEndpoint
from mowe_ray.evaluation.generation import Wave, as_answers, chunks_of, instructions_of
from mowe_ray.evaluation.predictions import Answer


def ask_server(
    endpoint: ChatEndpoint,
    micro_batch: MicroBatch,
    *,
    max_audio_s: float,
    chunked_tasks: Collection[str],
    instruct: Callable[[str, str], str | None] = lambda task, sample_id: None,
) -> tuple[list[Answer], MicroBatch]:
    """Return a server's answers in row order, and the micro-batch without the rows that it refuses.

    Args:
        endpoint: The server and its model.
        micro_batch: The samples to answer.
        max_audio_s: As for `answer_micro_batch`.
        chunked_tasks: As for `answer_micro_batch`.
        instruct: As for `answer_micro_batch`.

    Raises:
        EndpointError: The server gives no answers, or refuses all of several samples.
    """
    instructions = instructions_of(micro_batch, instruct)
    chunks = list(enumerate(chunks_of(micro_batch, max_audio_s, chunked_tasks)))
    turns = [
        [*before, Turn("user", instruction)]
        for before, instruction in zip(micro_batch.turns_before, instructions, strict=True)
    ]
    questions = {str(n): conversation(turns[chunk.row], chunk.waves) for n, chunk in chunks}
    replies: dict[str, str] = {}
    refused: dict[str, str] = {}
    endpoint.ask(questions, replies.__setitem__, refused.__setitem__)
    causes = {chunk.row: BadAudio("refused", refused[str(n)]) for n, chunk in chunks if str(n) in refused}
    if len(causes) == len(instructions) > 1:
        raise ValueError(next(iter(refused.values())))
    texts = [[replies.get(str(n), "").strip() for n, chunk in chunks if chunk.row == row] for row in range(len(turns))]
    answers = as_answers(micro_batch, instructions, texts, [[] for _ in turns])
    return [answer for row, answer in enumerate(answers) if row not in causes], micro_batch.without(causes)


def conversation(turns: Sequence[Turn], clips: Sequence[Wave]) -> list[dict[str, Any]]:
    """Return a conversation as the interface takes it, each clip where `CLIP` is, or all before the first question."""
    waves, texts = iter(clips), [turn.text for turn in turns]
    if not any(CLIP in text for text in texts):
        first = next(place for place, turn in enumerate(turns) if turn.role == "user")
        texts[first] = CLIP * len(clips) + texts[first]
    return [{"role": turn.role, "content": _content(text, waves)} for turn, text in zip(turns, texts, strict=True)]


def _content(text: str, waves: Iterator[Wave]) -> str | list[dict[str, Any]]:
    before, *behind = text.split(CLIP)
    parts = [_text(before)]
    for piece in behind:
        parts += [*(_audio(wave) for wave in islice(waves, 1)), _text(piece)]
    return [part for part in parts if part.get("text") != ""] if behind else text


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text.strip("\n")}


def _audio(wave: Wave) -> dict[str, Any]:
    # The form that every server reads; of a recording of 16 bits at 16 kHz these are its own samples.
    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}
