"""Transcriptions: the form that is sent, long recordings in pieces as in an evaluation, and the formats of answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.evaluation.generation import cut
from mowe_ray.serving.question import Question, Refused, Reply, Wave, ask_about
from mowe_ray.serving.schema import RESPONSE_FORMATS, TRANSCRIBE, mowe_report

# Pieces of one recording that are asked about at a time: the rest of the queue is for others.
_AT_ONCE = 8


@dataclass(frozen=True)
class TranscriptionRequest:
    """A form.

    Attributes:
        model: Its name.
        data: The encoded recording.
        prompt: The instruction.
        response_format: Of `RESPONSE_FORMATS`.
        language: Repeated in the answer; the model is not told.
    """

    model: str
    data: bytes
    prompt: str
    response_format: str
    language: str


@dataclass(frozen=True)
class Transcript:
    """What was said in a recording: a reply for each piece, from (start, end) in seconds."""

    replies: list[Reply]
    spans: list[tuple[float, float]]

    @property
    def text(self) -> str:
        """All of it, joined as `evaluate` joins the pieces of a long clip."""
        return " ".join(reply.text for reply in self.replies if reply.text)

    def content(self, asked: TranscriptionRequest, decode_ms: float) -> dict[str, Any]:
        """Return the answer in the format that was asked for."""
        whole = replace(
            self.replies[0],
            clips=[clip for reply in self.replies for clip in reply.clips],
            milliseconds={
                name: round(sum(reply.milliseconds[name] for reply in self.replies), 1)
                for name in self.replies[0].milliseconds
            },
        )
        plain = {"text": self.text, "mowe": mowe_report(whole, decode_ms)}
        if asked.response_format == "json":
            return plain
        segments = [
            {"id": number, "start": start, "end": end, "text": reply.text}
            for number, (reply, (start, end)) in enumerate(zip(self.replies, self.spans, strict=True))
        ]
        more = {"task": "transcribe", "language": asked.language, "duration": self.spans[-1][1]}
        return {**more, **plain, "segments": segments}


async def read_transcription(request: Request) -> TranscriptionRequest:
    """Return the form of a request.

    Raises:
        Refused: A field is missing, or asks for what there is not.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(
            "send a form with `file` and `model`, as multipart/form-data", status=415, code="unsupported_media_type"
        )
    try:
        async with request.form(max_files=1, max_fields=20) as form:
            fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Refused("file: send the recording as a file of the form", param="file")
            data = await file.read()
    except HTTPException as error:
        raise Refused(f"the form cannot be read: {error.detail}", code="invalid_form") from error
    if "model" not in fields:
        raise Refused("model: is missing", param="model")
    response_format = fields.get("response_format", "json")
    if response_format not in RESPONSE_FORMATS:
        raise Refused(
            f"response_format: {response_format!r} is none of {', '.join(RESPONSE_FORMATS)}",
            code="unsupported_format",
            param="response_format",
        )
    if fields.get("stream", "false").lower() not in ("false", "0"):
        raise Refused("stream: transcriptions come whole; leave it out", code="unsupported_parameter", param="stream")
    if not data:
        raise Refused("file: is empty", param="file")
    prompt, language = fields.get("prompt") or TRANSCRIBE, fields.get("language") or "unknown"
    return TranscriptionRequest(fields["model"], data, prompt, response_format, language)


async def transcribe(
    wave: Wave,
    asked: TranscriptionRequest,
    *,
    max_audio_s: float,
    max_new_tokens: int,
    answer: Callable[[Question], Awaitable[Reply]],
) -> Transcript:
    """Transcribe a recording, in pieces of at most `max_audio_s` seconds.

    Args:
        wave: The recording.
        asked: What is asked.
        max_audio_s: Length of a piece, in seconds.
        max_new_tokens: Longest answer to a piece, in tokens.
        answer: Asks the model.
    """
    samples = round(max_audio_s * SAMPLE_RATE)
    places = asyncio.Semaphore(_AT_ONCE)

    async def ask(piece: Wave) -> Reply:
        async with places:
            return await answer(ask_about([piece], asked.prompt, max_new_tokens=max_new_tokens))

    pieces = cut(wave, samples, chunked=True)
    asked_for = [asyncio.ensure_future(ask(piece)) for piece in pieces]
    try:
        replies = await asyncio.gather(*asked_for)
    finally:
        for reply in asked_for:  # one that failed, or a client that hangs up, ends all
            reply.cancel()
    starts = [number * samples / SAMPLE_RATE for number in range(len(pieces))]
    ends = [*starts[1:], round(len(wave) / SAMPLE_RATE, 3)]
    return Transcript(list(replies), list(zip(starts, ends, strict=True)))
