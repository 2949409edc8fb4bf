"""The outermost layer of the gateway: what each HTTP request was, for metrics and traces. It changes no answer."""

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agents.gateway import Gateway
from agents.middleware import header

METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
UNMATCHED: Final = "unmatched"
CLIENT_LEFT: Final = 499  # nginx's status for a client that left before an answer


class Observed:
    """Counts and times what goes through. Probes are counted but not traced."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gateway: Gateway = scope["app"].state.gateway
        status, first_byte_s, began = CLIENT_LEFT, None, time.perf_counter()

        async def watched_send(message: Message) -> None:
            nonlocal status, first_byte_s
            if message["type"] == "http.response.start":
                status, first_byte_s = message["status"], time.perf_counter() - began
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else "other"
        gateway.metrics.open_requests.inc()
        try:
            if not scope["path"].startswith("/v1/"):
                await self._app(scope, receive, watched_send)
                return
            with gateway.tracer.span(method, "server", parent=header(scope, b"traceparent")) as span:
                try:
                    await self._app(scope, receive, watched_send)
                finally:
                    route = _route(scope)
                    span.rename(f"{method} {route}")
                    span.note(http__request__method=method, http__route=route, http__response__status_code=status)
                    if status >= 500:
                        span.fail(str(status))
        finally:
            gateway.metrics.open_requests.dec()
            gateway.metrics.count_request(method, _route(scope), status, first_byte_s)


def _route(scope: Scope) -> str:
    """The path as the route has it, with names for what varies: a label must not have a value per conversation."""
    return str(getattr(scope.get("route"), "path", UNMATCHED))
