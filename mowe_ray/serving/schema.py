"""OpenAI's requests and answers, as far as this server knows them; what would change an answer unnoticed is refused."""

from __future__ import annotations

import base64
import binascii
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

from mowe_ray.serving.question import Refused, Reply, Sampling

FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "mp4", "webm", "aac")
RESPONSE_FORMATS = ("json", "text", "verbose_json")
TRANSCRIBE = "Write down what is said."

# What the model cannot do, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
}


class TextPart(BaseModel):
    """A text within a message."""

    type: Literal["text"]
    text: str


class InputAudio(BaseModel):
    """An encoded file; its own first bytes say what it is."""

    data: str
    format: str = "wav"


class AudioPart(BaseModel):
    """A clip within a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio

    def content(self, param: str) -> bytes:
        """Return the file.

        Raises:
            Refused: It is no base64, or said to be of an unknown format.
        """
        if self.input_audio.format.lower() not in FORMATS:
            raise Refused(
                f"{param}.format: {self.input_audio.format!r} is none of {', '.join(FORMATS)}",
                code="unsupported_format",
                param=f"{param}.format",
            )
        text = self.input_audio.data
        if text.startswith("data:"):
            text = text.partition(",")[2]
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            why = "an address is not fetched, send the file" if "://" in text[:10] else error
            raise Refused(f"{param}.data: not base64: {why}", param=f"{param}.data") from error
        if not data:
            raise Refused(f"{param}.data: is empty", param=f"{param}.data")
        return data


Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def parts(self) -> list[TextPart | AudioPart]:
        """Return the content in parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class MoweOptions(BaseModel, extra="forbid"):
    """What is ours: pool members to do without."""

    without: list[str] = []


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value or []


class ChatRequest(BaseModel):
    """A request for a chat completion."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field([], max_length=4)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    mowe: MoweOptions = MoweOptions()

    def sampling(self) -> Sampling:
        """Return how tokens are drawn: the most likely one unless a temperature is given."""
        if not self.temperature:
            return Sampling()
        return Sampling(self.temperature, 1.0 if self.top_p is None else self.top_p, self.seed)


def read_chat(body: bytes) -> ChatRequest:
    """Return a request for a chat completion.

    Raises:
        Refused: It is no JSON, or asks for what there is not.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise Refused("the body must be a JSON object with `model` and `messages`", code="invalid_json")
    for name, nothing in _UNSUPPORTED.items():
        if content.get(name) not in nothing:
            raise Refused(
                f"{name}: this model writes one text and has nothing for it; leave it out",
                code="unsupported_parameter",
                param=name,
            )
    try:
        return TypeAdapter(ChatRequest).validate_python(content)
    except ValidationError as error:
        # Of a value that may be two things, what is wrong with it says the deeper one.
        first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
        # Without pydantic's own steps, the kinds of a union; that of a part is also its key.
        steps = [str(step) for step in first["loc"] if step != "str" and not str(step).startswith("list[")]
        path = ".".join(step for step, _ in groupby(steps))
        raise Refused(f"{path}: {first['msg']}", param=path) from error


def error_body(error: Refused) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


@dataclass(frozen=True)
class Completion:
    """Writes the answers to one request.

    Attributes:
        model: Its name.
        id: Of the answer.
        created: In seconds since 1970.
    """

    model: str
    id: str
    created: int

    @classmethod
    def of(cls, model: str) -> Completion:
        """Return one for a request that came now."""
        return cls(model, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, reply: Reply, decode_ms: float) -> dict[str, Any]:
        """Return a whole answer."""
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage(reply),
            "mowe": mowe_report(reply, decode_ms),
        }

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        """Return a part of a streamed answer, as a server-sent event."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def usage_chunk(self, reply: Reply) -> str:
        """Return the usage of a streamed answer, as a server-sent event."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(reply)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(content: Mapping[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def usage(reply: Reply) -> dict[str, int]:
    """Return the tokens of an answer."""
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


def mowe_report(reply: Reply, decode_ms: float) -> dict[str, Any]:
    """Return what ran for an answer: encoders by clip, milliseconds by part, operations spent and if all had run."""
    return {
        "clips": [asdict(clip) for clip in reply.clips],
        "milliseconds": {"decode": round(decode_ms, 1), **reply.milliseconds},
        "gflops": round(sum(clip.gflops for clip in reply.clips), 4),
        "gflops_dense": round(sum(clip.gflops_dense for clip in reply.clips), 4),
        "batch_size": reply.batch_size,
    }
