"""Two scripted replicas behind one address, for stacks without Ray Serve.

It places each connection at the healthy replica that has fewest, as Serve's HAProxy does, and asks for health the same
way: over HTTP. A process that is paused still accepts connections, so accepting proves nothing.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from onebox.sockets import free_port
from tests.faults.background import BackgroundLoop

CHECK_EVERY_S = 0.3
CHECK_WITHIN_S = 0.6
CHUNK = 65_536


class Balancer:
    """The address of all `ports`. Use as a context manager."""

    def __init__(self, ports: Sequence[int], token: str) -> None:
        self.port = free_port()
        self._ports = tuple(ports)
        self._probe = f"GET /healthz HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n"
        self._healthy: set[int] = set()
        self._load: Counter[int] = Counter()
        self._background = BackgroundLoop("balancer")
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._background.start()
        self._server = self._background.do(asyncio.start_server(self._accept, "127.0.0.1", self.port))
        self._background.do(self._begin())
        return self

    def __exit__(self, *_: object) -> None:
        self._background.do(self._shut())
        self._background.stop()

    async def _begin(self) -> None:
        for port in self._ports:
            self._tasks.add(asyncio.create_task(self._watch(port)))

    async def _shut(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, port: int) -> None:
        while True:
            if await self._is_healthy(port):
                self._healthy.add(port)
            else:
                self._healthy.discard(port)
            await asyncio.sleep(CHECK_EVERY_S)

    async def _is_healthy(self, port: int) -> bool:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CHECK_WITHIN_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(self._probe.encode())
                return b" 200 " in await reader.readline()
        except (OSError, TimeoutError):
            return False
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            for port in sorted(self._healthy, key=lambda each: self._load[each]):
                with suppress(OSError):
                    up_reader, up = await asyncio.open_connection("127.0.0.1", port)
                    break
            else:
                return
            self._load[port] += 1
            try:
                await _splice(reader, writer, up_reader, up)
            finally:
                self._load[port] -= 1
                up.transport.abort()
        finally:
            writer.transport.abort()
            self._tasks.discard(task)


async def _splice(
    down_reader: asyncio.StreamReader,
    down: asyncio.StreamWriter,
    up_reader: asyncio.StreamReader,
    up: asyncio.StreamWriter,
) -> None:
    pumps = [asyncio.create_task(_pump(down_reader, up)), asyncio.create_task(_pump(up_reader, down))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await source.read(CHUNK):
            sink.write(chunk)
            await sink.drain()
