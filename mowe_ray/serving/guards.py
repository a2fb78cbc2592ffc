"""What stands before the interface: who may ask, how much may be sent, and from where a browser may come."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mowe_ray.serving.metrics import Metrics
from mowe_ray.serving.question import Refused
from mowe_ray.serving.schema import error_body

# The page can be loaded by anyone: it asks for the token.
_OPEN = frozenset(("/", "/page.js", "/page.css", "/health"))
# The page runs nothing but its own script, and asks nobody else for anything.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src blob: data:; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Guards:
    """Middleware in front of the interface.

    Args:
        app: What is guarded.
        token: Who asks must send it as `Authorization: Bearer TOKEN`; None lets everyone ask.
        max_bytes: Longer bodies are refused.
        hosts: Names under which the server may be asked, so that no page elsewhere reaches it by a name of its own;
            None takes any.
        metrics: Count what is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        max_bytes: int,
        hosts: frozenset[str] | None,
        metrics: Metrics,
    ):
        self._app, self._token, self._max_bytes, self._hosts, self._metrics = app, token, max_bytes, hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        sent = 0
        started = False

        async def limited() -> Message:
            nonlocal sent
            message = await receive()
            sent += len(message.get("body", b""))
            if sent > self._max_bytes:
                raise _too_large(self._max_bytes)
            return message

        async def with_policy(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                more = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
                more |= {"referrer-policy": "no-referrer"}
                message["headers"] += [(name.encode(), value.encode()) for name, value in more.items()]
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self._app(scope, limited, with_policy)
        except Refused as error:
            if started:
                raise
            self._metrics.request(scope["path"], error.status)
            await refusal(error)(scope, receive, send)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]").lower()
        if self._hosts is not None and host not in self._hosts:
            raise Refused(f"this server does not answer for {host!r}", status=403, code="unknown_host")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise _too_large(self._max_bytes)
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if self._token is not None and path not in _OPEN and not hmac.compare_digest(given, self._token.encode()):
            raise Refused(
                "send the server's token as `Authorization: Bearer TOKEN`", status=401, code="invalid_api_key"
            )


def refusal(error: Refused) -> JSONResponse:
    """Return the answer to a refused request."""
    headers: dict[str, Any] = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def _too_large(max_bytes: int) -> Refused:
    return Refused(
        f"the request is larger than {max_bytes / 1e6:g} MB: send a shorter or compressed clip",
        status=413,
        code="request_too_large",
    )
