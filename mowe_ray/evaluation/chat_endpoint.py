"""A client of OpenAI-compatible chat endpoints: many questions, a limited number at a time, at temperature 0."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import openai

_NO_KEY = "no-key"  # the library insists on one
# The messages of a conversation, as the interface takes them.
Conversation = Sequence[Mapping[str, Any]]
# Of a question that this server does not take: others may do better.
_REFUSED = (400, 413, 415, 422)


class EndpointError(ValueError):
    """An endpoint cannot be asked, or gave no reply; the message names the key to change."""


@dataclass(frozen=True)
class ChatEndpoint:
    """An OpenAI-compatible chat endpoint.

    Attributes:
        base_url: Such as http://localhost:8000/v1.
        api_key_env: Environment variable with the key. It may be missing: local servers need none.
        concurrency: Most questions on their way at a time.
        timeout_s: Longest wait for a reply.
        max_retries: Tries after the first.
        max_tokens: Longest reply, in tokens. The default is enough for a judge that thinks before it writes its two
            lines, and an end for one that never stops.
        section: Of the configuration, for messages: `judge`, or `server`, whose address and model are arguments.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout_s: float = 60.0
    max_retries: int = 5
    max_tokens: int = 1024
    section: Literal["judge", "server"] = "judge"

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise EndpointError(
                f"{self._key('base_url')}: must be like http://localhost:8000/v1, got {self.base_url!r}"
            )

    def first_model(self) -> str:
        """Return the name of the first model that the server lists.

        Raises:
            EndpointError: It lists none.
        """
        import openai  # half a second, and most evaluations ask nobody

        key, once_more = self._api_key(), replace(self, max_retries=min(1, self.max_retries))
        client = openai.OpenAI(
            base_url=self.base_url, api_key=key, timeout=self.timeout_s, max_retries=once_more.max_retries
        )
        try:
            return next(iter(client.models.list())).id
        except (openai.NotFoundError, StopIteration, AttributeError, ValueError, TypeError):  # or it is another service
            named = f"{self.base_url} lists no models; name one as {self.base_url}#MODEL"
            raise EndpointError(f"{self._key('model')}: {named}") from None
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            raise EndpointError(once_more._problem(error, key)) from None

    def ask(
        self,
        questions: Mapping[str, Conversation],
        on_reply: Callable[[str, str], None],
        on_refused: Callable[[str, str], None] | None = None,
    ) -> None:
        """Ask every question once.

        429, 5xx, timeouts and broken connections are retried with exponential backoff, or the server's Retry-After.

        Args:
            questions: Conversations by name, each of which ends with a question.
            on_reply: Called with the name and the reply of each question, in the order of arrival.
            on_refused: Called with the name of a question that the server does not take, and why; None ends all.

        Raises:
            EndpointError: A question got no reply; requests in flight are cancelled.
        """
        try:
            asyncio.run(self._ask_all(questions, on_reply, on_refused))
        except BaseExceptionGroup as failures:  # one for each worker that failed: usually the same
            raise failures.exceptions[0] from None

    async def _ask_all(
        self,
        questions: Mapping[str, Conversation],
        on_reply: Callable[[str, str], None],
        on_refused: Callable[[str, str], None] | None,
    ) -> None:
        import openai

        waiting = iter(questions.items())  # shared: each question goes to the first worker that is free
        async with openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._api_key(), timeout=self.timeout_s, max_retries=self.max_retries
        ) as client:

            async def work() -> None:
                for name, question in waiting:
                    try:
                        reply = await self._ask(client, question)
                    except (openai.APIStatusError, openai.APIConnectionError) as error:
                        # Not from the error: what it holds may show the key.
                        problem = self._problem(error, client.api_key)
                        if on_refused is None or getattr(error, "status_code", None) not in _REFUSED:
                            raise EndpointError(problem) from None
                        on_refused(name, problem)
                    else:
                        on_reply(name, reply)

            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self.concurrency, len(questions))):
                    workers.create_task(work())

    async def _ask(self, client: openai.AsyncOpenAI, question: Conversation) -> str:
        for attempt in range(self.max_retries + 1):
            if attempt:
                # The client retries errors itself; this is for replies that are no chat completion.
                await asyncio.sleep(min(0.25 * 2**attempt, 8))
            response = await client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=question,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=self.max_tokens,
            )
            reply = _content(response.text)
            if reply is not None:
                return reply
        detail = _shown(response.text, client.api_key)
        raise EndpointError(
            f"{self._key('base_url')}: {self.base_url} answers, but not with chat completions: {detail}"
        )

    def _api_key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise EndpointError(f"{self._key('api_key_env')}: {self.api_key_env} holds characters that no key has")
        return key or _NO_KEY

    def _problem(self, error: openai.APIStatusError | openai.APIConnectionError, key: str) -> str:
        has_reason = " - " in error.message  # the library found the reason in the body
        detail = _shown(error.message if has_reason else f"{error.message} {error.body or error.__cause__ or ''}", key)
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            held = "the key in" if key != _NO_KEY else "to answer without a key, and there is none in"
            return f"{self._key('api_key_env')}: {self.base_url} refuses {held} {self.api_key_env}: {detail}"
        if status == 404:
            where = " or ".join(dict.fromkeys((self._key("model"), self._key("base_url"))))
            return f"{where}: {self.base_url} knows no chat model {self.model!r}: {detail}"
        if status is not None and status < 500 and status not in (408, 409, 429):
            return f"{self._key('model')}: {self.model!r} at {self.base_url} refuses the question: {detail}"
        tries = "1 try" if not self.max_retries else f"{self.max_retries + 1} tries"
        retries = self._key("max_retries")
        return f"{self._key('base_url')}: {self.base_url} gave no reply in {tries} ({retries}): {detail}"

    def _key(self, name: str) -> str:
        """Return what to change: a key, or the argument that names the server and its model."""
        is_argument = self.section == "server" and name in ("base_url", "model")
        return "RUN_OR_EXPORT" if is_argument else f"{self.section}.{name}"


def _content(body: str) -> str | None:
    """Text of a chat completion, empty where the model wrote none; None if this is no chat completion."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return content if isinstance(content, str) else "" if content is None else None


def _shown(text: str, key: str) -> str:
    """One line of what a server said; some servers repeat the key."""
    line = " ".join(text.replace(key, "(the key)").split())
    return line if len(line) <= 300 else f"{line[:300]} ..."
