"""A replica's own door: its app on a port of its own, beside the fleet's ingress.

A gateway asks it whether the replica lives and aborts requests there, which an ingress would send to any replica; it
is also the way in while the ingress is away. What it serves is `serving.server`.
"""

import asyncio
import errno
import random
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from onebox.errors import SetupError

CLOSE_TIMEOUT_S = 1


class Door:
    """A free port at `host`, taken at once; served from `open` to `close` in the running event loop.

    Raises:
        SetupError: all `ports` are taken.
    """

    def __init__(self, host: str, ports: range) -> None:
        self._socket = _listen(host, ports)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def open(self, app: ASGIApp) -> None:
        """Begin to answer."""
        config = uvicorn.Config(
            app, interface="asgi3", lifespan="off", log_config=None, timeout_graceful_shutdown=CLOSE_TIMEOUT_S
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve([self._socket]), name="door")

    async def close(self) -> None:
        """Stop answering; replies that go through the door break off."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self._socket.close()


def _listen(host: str, ports: range) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(ports, len(ports)):
        try:
            return socket.create_server((host, port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise SetupError(
        f"No port from {ports[0]} to {ports[-1]} on {host} is free for a replica's door. "
        "Widen ONEBOX_ENGINE_DOOR_PORTS, or run fewer replicas on this machine."
    )


class _Server(uvicorn.Server):
    """Leaves the process's signals to whoever has them."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """None of them."""
        yield
