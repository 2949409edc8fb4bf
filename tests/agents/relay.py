"""A TCP relay in front of a gateway that cuts connections where a test says."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import httpx


class Relay:
    """Passes bytes on; `cuts` says after how many bytes of answer each connection in turn ends, None: it does not."""

    def __init__(self, target: str, cuts: Iterator[int | None]) -> None:
        url = httpx.URL(target)
        self._host, self._port = url.host, url.port or 80
        self._cuts = cuts
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.url = ""

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection."""
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer, next(self._cuts, None)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: int | None) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        ways = {asyncio.create_task(_pass_on(reader, back, None)), asyncio.create_task(_pass_on(there, writer, cut))}
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, back):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit: int | None) -> None:
    left = limit
    with suppress(OSError):
        while left is None or left > 0:
            piece = await source.read(65536 if left is None else left)
            if not piece:
                return
            sink.write(piece)
            await sink.drain()
            left = None if left is None else left - len(piece)


@asynccontextmanager
async def run_relay(target: str, cuts: Iterator[int | None]) -> AsyncIterator[Relay]:
    """A relay to `target`, at its `url`."""
    relay = Relay(target, cuts)
    server = await asyncio.start_server(relay.accept, "127.0.0.1", 0)
    relay.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield relay
    finally:
        server.close()
        await relay.close()
