"""How handlers read their JSON: with orjson, which refuses what is not UTF-8 or has lone surrogates."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute


class LeanRequest(Request):
    """A request whose JSON is read by orjson."""

    async def json(self) -> Any:
        """The body's value. Raises `json.JSONDecodeError`, of which orjson's is a kind."""
        return orjson.loads(await self.body())


class LeanRoute(APIRoute):
    """A route whose handler gets a `LeanRequest`."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]  # Coroutine there
        """The handler around which FastAPI validates."""
        handle = super().get_route_handler()

        async def lean(request: Request) -> Response:
            return await handle(LeanRequest(request.scope, request.receive))

        return lean
