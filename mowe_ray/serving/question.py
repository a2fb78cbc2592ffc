"""What is asked of a model, and what comes back: values that travel between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mowe_ray.data.decode import SAMPLE_RATE

Wave = npt.NDArray[np.float32]


class Refused(ValueError):  # noqa: N818 - what happened to a request
    """A request that gets no answer, as OpenAI's interface reports it.

    Args:
        message: What is wrong and what to do about it.
        status: Of HTTP.
        code: OpenAI's short name of the problem.
        param: The part of the request that is wrong.
        retry_after_s: When to try again, for what is wrong only now.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message, status, code, param, retry_after_s)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _refused, self.args


def _refused(message: str, status: int, code: str, param: str | None, retry_after_s: int | None) -> Refused:
    return Refused(message, status=status, code=code, param=param, retry_after_s=retry_after_s)


@dataclass(frozen=True, eq=False)
class Message:
    """A turn of a conversation: texts, and clips of 16 kHz, in the order in which they were said."""

    role: str
    parts: tuple[str | Wave, ...]

    def for_processor(self) -> dict[str, Any]:
        """Return the message as `apply_chat_template` takes it."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "audio", "audio": part}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without a temperature the most likely one is taken."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Question:
    """A conversation to be continued.

    Attributes:
        messages: The conversation.
        max_new_tokens: Longest answer, in tokens.
        without: Names of pool members that are treated as absent.
        sampling: How tokens are drawn.
        stop: Texts that end an answer, and are not part of it.
        in_pieces: Tell pieces of the answer as they come, before the reply.
    """

    messages: tuple[Message, ...]
    max_new_tokens: int = 200
    without: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    in_pieces: bool = False

    @property
    def clips(self) -> list[Wave]:
        """All clips, in order."""
        return [part for message in self.messages for part in message.parts if not isinstance(part, str)]

    @property
    def longest_s(self) -> float:
        """Length of the longest clip, in seconds."""
        return max(map(len, self.clips), default=0) / SAMPLE_RATE


def ask_about(clips: Sequence[Wave], question: str, **options: Any) -> Question:
    """Return a question about clips, which come first as in training."""
    return Question((Message("user", (*clips, question)),), **options)


@dataclass(frozen=True)
class Piece:
    """The next part of an answer's text."""

    text: str


@dataclass(frozen=True)
class ClipReport:
    """Which encoders ran on a clip.

    Attributes:
        seconds: Its length.
        independent, dependent: Probability of each pool member by the router that is equal for all clips, and by the
            one that depends on the clip; None without that router.
        chosen: Names of the members that each router chose, by `independent` and `dependent`.
        ran: Names of the members that ran, which are those of both.
        gflops, gflops_dense: 1e9 operations of the audio side for this clip, and if all members had run.
    """

    seconds: float
    independent: dict[str, float] | None
    dependent: dict[str, float] | None
    chosen: dict[str, list[str]]
    ran: list[str]
    gflops: float
    gflops_dense: float


@dataclass(frozen=True)
class Reply:
    """A whole answer.

    Attributes:
        text: What was said, equal to the joined pieces.
        finish_reason: `stop` or `length`.
        prompt_tokens, completion_tokens: Lengths, in tokens.
        clips: A report for each clip.
        milliseconds: Time by part: `queue`, `encoders` and `generation`; of the batch it was answered in.
        batch_size: Questions that were answered together.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    clips: list[ClipReport]
    milliseconds: dict[str, float]
    batch_size: int = 1
