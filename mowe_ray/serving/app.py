"""The server's interface: OpenAI's chat completions and transcriptions, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from mowe_ray.output.html_page import STYLE
from mowe_ray.serving.batching import Backend
from mowe_ray.serving.decoding import Decoders
from mowe_ray.serving.examples import Example
from mowe_ray.serving.guards import Guards, refusal
from mowe_ray.serving.metrics import Metrics
from mowe_ray.serving.question import Message, Piece, Question, Refused, Reply, Wave
from mowe_ray.serving.schema import AudioPart, ChatRequest, Completion, error_body, event, mowe_report, read_chat
from mowe_ray.serving.transcription import read_transcription, transcribe

Result = TypeVar("Result")

_PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
_PAGE_FILES |= {"/page.css": ("page.css", "text/css")}
_CHAT, _TRANSCRIPTIONS = "/v1/chat/completions", "/v1/audio/transcriptions"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be.

    Attributes:
        max_audio_s: Longest clip of a chat, and of a piece of a transcription, in seconds.
        max_transcription_s: Longest recording that is transcribed, in seconds.
        max_upload_bytes: Longest request.
        max_new_tokens: Longest answer, in tokens, also where the request says nothing.
        max_clips: Clips of a conversation.
        max_in_flight: Requests at a time; more are refused for now.
        timeout_s: Longest time for an answer, in seconds.
    """

    max_audio_s: float = 30.0
    max_transcription_s: float = 3600.0
    max_upload_bytes: int = 100_000_000
    max_new_tokens: int = 200
    max_clips: int = 16
    max_in_flight: int = 64
    timeout_s: float = 120.0


class Interface:
    """Answers the requests of one process.

    Args:
        backend: Who answers questions.
        decoders: Decode what is uploaded; closed with the interface.
        limits: Of requests.
        examples: Clips that the page offers.
    """

    def __init__(self, backend: Backend, decoders: Decoders, limits: Limits, examples: Sequence[Example] = ()):
        self._backend, self._decoders, self._limits, self._examples = backend, decoders, limits, list(examples)
        self._in_flight = 0
        self._started = int(time.time())
        self.metrics = Metrics()

    def app(self, token: str | None = None, hosts: frozenset[str] | None = None) -> ASGIApp:
        """Return the ASGI application; `token` and `hosts` as for `Guards`."""
        # Without its pages of documentation: they would fetch scripts from elsewhere.
        app = FastAPI(title="mowe_ray", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        app.add_api_route(_CHAT, self._chat, methods=["POST"], response_model=None)
        app.add_api_route(_TRANSCRIPTIONS, self._transcriptions, methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self._models, methods=["GET"], response_model=None)
        app.add_api_route("/v1/models/{name:path}", self._model, methods=["GET"], response_model=None)
        app.add_api_route("/health", self._health, methods=["GET"], response_model=None)
        app.add_api_route("/metrics", self._metrics, methods=["GET"], response_model=None)
        app.add_api_route("/examples", self._list_examples, methods=["GET"], response_model=None)
        app.add_api_route("/examples/{number:int}", self._example, methods=["GET"], response_model=None)
        for path in _PAGE_FILES:
            app.add_api_route(path, self._page, methods=["GET"], response_model=None)
        app.add_exception_handler(Refused, self._on_refused)
        app.add_exception_handler(HTTPException, self._on_http)
        return Guards(
            app,
            token=token,
            max_bytes=self._limits.max_upload_bytes,
            hosts=hosts,
            metrics=self.metrics,
        )

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        self._decoders.close()

    # ---- questions ----

    async def _chat(self, request: Request) -> Response:
        with self._place(request):
            if not request.headers.get("content-type", "").startswith("application/json"):
                raise Refused(
                    "send JSON, as `Content-Type: application/json`", status=415, code="unsupported_media_type"
                )
            asked = read_chat(await request.body())
            self._known(asked.model)
            if asked.stream:
                return await self._streamed(asked, request)
            reply, decode_ms = await _while_connected(request, self._in_time(self._whole(asked)))
            return JSONResponse(Completion.of(asked.model).whole(reply, decode_ms))

    async def _whole(self, asked: ChatRequest) -> tuple[Reply, float]:
        question, decode_ms = await self._question(asked)
        return await self._reply(asked.model, question), decode_ms

    async def _reply(self, model: str, question: Question) -> Reply:
        async with aclosing(self._backend.answer(model, question)) as answer:  # type: ignore[type-var]
            async for piece in answer:
                if isinstance(piece, Reply):
                    self.metrics.answered(model, piece)
                    return piece
        raise Refused("the model gave no answer; ask again", status=503, code="server_error", retry_after_s=1)

    async def _streamed(self, asked: ChatRequest, request: Request) -> Response:
        question, decode_ms = await self._in_time(self._question(asked))
        answer = self._backend.answer(asked.model, question)
        try:
            # What is refused is refused before the answer begins, with a status of its own.
            first = await _while_connected(request, self._in_time(anext(answer)))
        except BaseException:
            await answer.aclose()  # type: ignore[attr-defined]
            raise
        events = self._events(asked, answer, first, decode_ms)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _events(
        self, asked: ChatRequest, answer: AsyncIterator[Piece | Reply], first: Piece | Reply, decode_ms: float
    ) -> AsyncIterator[str]:
        completion = Completion.of(asked.model)
        self._in_flight += 1
        try:
            async with aclosing(answer), asyncio.timeout(self._limits.timeout_s):  # type: ignore[type-var]
                yield completion.chunk({"role": "assistant", "content": ""})
                piece = first
                while isinstance(piece, Piece):
                    yield completion.chunk({"content": piece.text})
                    piece = await anext(answer)
                self.metrics.answered(asked.model, piece)
                yield completion.chunk({}, piece.finish_reason, mowe=mowe_report(piece, decode_ms))
                if asked.stream_options and asked.stream_options.include_usage:
                    yield completion.usage_chunk(piece)
                yield "data: [DONE]\n\n"
        except TimeoutError:
            yield event(error_body(_too_slow(self._limits.timeout_s)))
        except Refused as error:
            yield event(error_body(error))
        finally:
            self._in_flight -= 1

    async def _question(self, asked: ChatRequest) -> tuple[Question, float]:
        """Return what is asked, and the milliseconds of its decoding."""
        began, messages, clips = time.monotonic(), [], 0
        for number, message in enumerate(asked.messages):
            parts: list[str | Wave] = []
            for place, part in enumerate(message.parts()):
                if isinstance(part, AudioPart):
                    param = f"messages.{number}.content.{place}.input_audio"
                    clips += 1
                    if clips > self._limits.max_clips:
                        raise Refused(f"messages: more than {self._limits.max_clips} clips", param="messages")
                    data = part.content(param)
                    parts.append(await self._decoders.decode(data, max_s=self._limits.max_audio_s, param=param))
                else:
                    parts.append(part.text)
            messages.append(Message("system" if message.role == "developer" else message.role, tuple(parts)))
        question = Question(
            tuple(messages),
            min(
                asked.max_completion_tokens or asked.max_tokens or self._limits.max_new_tokens,
                self._limits.max_new_tokens,
            ),
            tuple(sorted(set(asked.mowe.without))),
            asked.sampling(),
            tuple(asked.stop),
            bool(asked.stream),
        )
        return question, 1e3 * (time.monotonic() - began)

    async def _transcriptions(self, request: Request) -> Response:
        with self._place(request):
            asked = await read_transcription(request)
            self._known(asked.model)
            began = time.monotonic()
            wave = await self._decoders.decode(asked.data, max_s=self._limits.max_transcription_s, param="file")
            decode_ms = 1e3 * (time.monotonic() - began)
            pieces = transcribe(
                wave,
                asked,
                max_audio_s=self._limits.max_audio_s,
                max_new_tokens=self._limits.max_new_tokens,
                answer=lambda question: self._reply(asked.model, question),
            )
            piece = await _while_connected(request, self._in_time(pieces))
            if asked.response_format == "text":
                return PlainTextResponse(piece.text + "\n")
            return JSONResponse(piece.content(asked, decode_ms))

    # ---- everything else ----

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self._backend.models()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._known(name)
        return JSONResponse(self._card(name))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "models": list(self._backend.models())})

    async def _metrics(self, request: Request) -> Response:
        self.metrics.in_flight.set(self._in_flight)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _page(self, request: Request) -> Response:
        name, media_type = _PAGE_FILES[request.url.path]
        text = (_PAGE / name).read_text(encoding="utf-8")
        # In the colours and type of the reports.
        return Response(STYLE + text if name == "page.css" else text, media_type=f"{media_type}; charset=utf-8")

    async def _list_examples(self, request: Request) -> Response:
        return JSONResponse([example.card() for example in self._examples])

    async def _example(self, request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(self._examples):
            raise Refused(f"there are {len(self._examples)} examples", status=404, code="not_found")
        return Response(self._examples[number].audio, media_type="application/octet-stream")

    def _card(self, name: str) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._started, "owned_by": "mowe_ray"}
        return {**card, "mowe": {"encoders": self._backend.models()[name]}}

    def _known(self, model: str) -> None:
        if model not in self._backend.models():
            raise Refused(
                f"model: there is no {model!r}, only {', '.join(self._backend.models())}",
                status=404,
                code="model_not_found",
                param="model",
            )

    @contextmanager
    def _place(self, request: Request) -> Iterator[None]:
        """Hold one of the places for requests, and count what became of it."""
        began, status = time.monotonic(), 499
        if self._in_flight >= self._limits.max_in_flight:
            self.metrics.request(request.url.path, 503)
            raise Refused(
                f"{self._in_flight} requests are being answered: try again",
                status=503,
                code="overloaded",
                retry_after_s=2,
            )
        self._in_flight += 1
        try:
            yield
            status = 200
        except Refused as error:
            status = error.status
            raise
        finally:
            self._in_flight -= 1
            self.metrics.request(request.url.path, status, time.monotonic() - began)

    async def _in_time(self, result: Awaitable[Result]) -> Result:
        try:
            return await asyncio.wait_for(result, self._limits.timeout_s)
        except TimeoutError as error:
            raise _too_slow(self._limits.timeout_s) from error

    async def _on_refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return refusal(error)

    async def _on_http(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_value")
        self.metrics.request(request.url.path, error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return refusal(Refused(message, status=error.status_code, code=code))


def _too_slow(seconds: float) -> Refused:
    return Refused(f"no answer within {seconds:g} s", status=504, code="timeout")


async def _while_connected(request: Request, result: Awaitable[Result]) -> Result:
    """Return a result, unless who asked hangs up meanwhile: then the work is given up."""
    answer = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refused("the client has hung up", status=499, code="client_closed_request")
        return await answer
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
