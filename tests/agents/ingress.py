"""A fleet's ingress that tests cut, close and turn: a TCP relay in front of replicas."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from onebox.sockets import free_port


class Ingress:
    """A way in that leads to one replica at a time, as a load balancer's does for a while."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server: asyncio.Server | None = None
        self._passing: set[asyncio.Task[None]] = set()
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.connections = 0

    async def open(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)

    async def close(self) -> None:
        """Die: connections break, new ones are refused."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._passing, return_exceptions=True)

    def cut(self) -> None:
        """Break every connection there is."""
        for task in self._passing:
            task.cancel()

    async def lead_to(self, port: int) -> None:
        """Connect to the replica at that port from now on."""
        await self.close()
        self._to = port
        await self.open()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._join(reader, writer))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        ways = [asyncio.create_task(_pass(reader, back)), asyncio.create_task(_pass(there, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, back):
                end.transport.abort()


async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await source.read(65536):
            sink.write(piece)
            await sink.drain()


@asynccontextmanager
async def ingress_of(port: int) -> AsyncIterator[Ingress]:
    """An open ingress to the replica at this port."""
    ingress = Ingress(port)
    await ingress.open()
    try:
        yield ingress
    finally:
        await ingress.close()
