"""A TCP proxy before a real Valkey that can be slow, away, full, or lose a reply after the command was executed.

It knows where commands and replies begin and end, so each fault hits whole commands, and it counts them, so that every
store command of a flow can be enumerated. It runs in a thread with a loop of its own; every method may be called from
any other thread. It changes no data: what passes, passes as it came.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Literal, Self

from onebox.sockets import free_port
from tests.faults.background import BackgroundLoop
from tests.faults.resp import command_at, is_push, reply_end

Link = Literal["up", "held", "blackhole", "refused"]
Fate = Literal["pass", "drop_before", "drop_reply", "lose_reply", "oom"]
Where = Literal["before", "after"]
OOM = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
CHUNK = 65_536
_PER_CHANNEL = frozenset({b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE"})


@dataclass(frozen=True, slots=True)
class Command:
    """One command on its way. `peer_port` is the client's; `number` counts from 1 over all connections."""

    number: int
    arguments: tuple[bytes, ...]
    peer_port: int

    @property
    def verb(self) -> str:
        """Its name in capitals."""
        return self.arguments[0].decode("ascii", "replace").upper()

    @property
    def script(self) -> str | None:
        """The SHA-1 of the Lua script it runs, if it runs one."""
        if self.verb == "EVALSHA":
            return self.arguments[1].decode()
        return sha1(self.arguments[1]).hexdigest() if self.verb == "EVAL" else None

    @property
    def text(self) -> str:
        """All arguments, for matching keys and values."""
        return b" ".join(self.arguments).decode("utf-8", "replace")


Match = Callable[[Command], bool]


def everything(_: Command) -> bool:
    """Matches each command."""
    return True


@dataclass
class Trap:
    """What happens to the next `times` commands that match. `then` is called at the moment the fate strikes.

    `drop_before`: never forwarded, the connection is cut. `drop_reply`: executed, then the connection is cut before
    its reply. `lose_reply`: executed, and the client hears nothing at all. `oom`: refused as a full store refuses.
    `skip` commands that match are let through first.
    """

    fate: Fate
    match: Match = everything
    times: int = 1
    skip: int = 0
    then: Callable[[Command], None] | None = None
    where: Where = "before"
    sprung: threading.Event = field(default_factory=threading.Event)

    def take(self, command: Command) -> bool:
        """Whether the trap strikes this command."""
        if self.times <= 0 or not self.match(command):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class _Pipe:
    """One client's connection and its own to the server."""

    def __init__(self, proxy: "RedisProxy", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.down_reader, self.down = reader, writer
        self.peer_port = int((writer.get_extra_info("peername") or ("", 0))[1])
        self.up: asyncio.StreamWriter | None = None
        self.pending: deque[tuple[Command, Trap | None]] = deque()
        self.swallowed = False

    async def run(self) -> None:
        try:
            up_reader, self.up = await asyncio.open_connection("127.0.0.1", self.proxy.server_port)
        except OSError:
            self.close()
            return
        pumps = {asyncio.ensure_future(self._commands()), asyncio.ensure_future(self._replies(up_reader))}
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.close()

    def close(self) -> None:
        for writer in (self.down, self.up):
            if writer is not None:
                writer.transport.abort()

    async def _commands(self) -> None:
        buffer = bytearray()
        assert self.up is not None
        while chunk := await self._read(self.down_reader):
            if self.proxy.link == "blackhole":
                self.swallowed = True
                continue
            if self.proxy.link == "held":
                await self.proxy.healed()
            if self.proxy.delay_s:
                await asyncio.sleep(self.proxy.delay_s)
            buffer += chunk
            done = 0
            while (found := command_at(buffer, done)) is not None:
                arguments, end = found
                if self.up.transport.is_closing() or not self._pass_on(tuple(arguments), bytes(buffer[done:end])):
                    return
                done = end
            del buffer[:done]
            with suppress(ConnectionError):
                await self.up.drain()

    def _pass_on(self, arguments: tuple[bytes, ...], raw: bytes) -> bool:
        assert self.up is not None
        command = self.proxy.seen(arguments, self.peer_port)
        trap = self.proxy.trap_for(command)
        if trap is not None and trap.where == "before" and trap.then is not None:
            trap.then(command)
        if trap is not None and trap.fate == "drop_before":
            trap.sprung.set()
            return False
        if trap is not None and trap.fate == "oom":
            trap.sprung.set()
            self.pending.append((command, trap))
            self.up.write(b"*1\r\n$4\r\nPING\r\n")  # its reply keeps the order of replies; OOM takes its place
            return True
        replies = max(1, len(arguments) - 1) if arguments[0].upper() in _PER_CHANNEL else 1
        self.pending.extend([(command, trap)] * replies)
        self.up.write(raw)
        return True

    async def _replies(self, reader: asyncio.StreamReader) -> None:
        buffer = bytearray()
        while chunk := await self._read(reader):
            buffer += chunk
            done = 0
            while (end := reply_end(buffer, done)) is not None:
                reply = bytes(buffer[done:end])
                done = end
                if is_push(reply):
                    await self._hand_down(reply)
                    continue
                command, trap = self.pending.popleft() if self.pending else (None, None)
                if command is not None and self.proxy.on_reply is not None:
                    self.proxy.on_reply(command, reply)
                if trap is None:
                    await self._hand_down(reply)
                elif not await self._strike(command, trap, reply):
                    return
            del buffer[:done]

    async def _strike(self, command: Command | None, trap: Trap, reply: bytes) -> bool:
        if trap.where == "after" and trap.then is not None and command is not None:
            trap.then(command)
        if trap.fate != "oom":
            trap.sprung.set()
        if trap.fate == "drop_reply":
            return False
        if trap.fate != "lose_reply":
            await self._hand_down(OOM if trap.fate == "oom" else reply)
        return True

    async def _hand_down(self, data: bytes) -> None:
        if self.proxy.link == "blackhole":
            self.swallowed = True
            return
        if self.proxy.link == "held":
            await self.proxy.healed()
        if self.down.transport.is_closing():
            return
        with suppress(ConnectionError):
            self.down.write(data)
            await self.down.drain()

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read(CHUNK)
        except (ConnectionError, OSError):
            return b""


class RedisProxy:
    """The proxy on a port of its own before the server at `server_port`. Use as a context manager.

    `on_reply` sees every command with its reply, in the order the server answered.
    """

    def __init__(self, server_port: int, on_reply: Callable[[Command, bytes], None] | None = None) -> None:
        self.server_port = server_port
        self.port = free_port()
        self.on_reply = on_reply
        self.link: Link = "up"
        self.delay_s = 0.0
        self.counts: Counter[str] = Counter()
        self._number = 0
        self._traps: list[Trap] = []
        self._pipes: set[_Pipe] = set()
        self._healed = asyncio.Event()
        self._background = BackgroundLoop("redis proxy")
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._background.start()
        self._healed.set()
        self._server = self._background.do(asyncio.start_server(self._accept, "127.0.0.1", self.port))
        return self

    def __exit__(self, *_: object) -> None:
        self._background.do(self._shut())
        self._background.stop()

    def set_link(self, link: Link) -> None:
        """Change what the network does. `held` keeps bytes and delivers them when it is `up` again.

        `blackhole` swallows them, so those connections are cut at its end; `refused` cuts all and accepts none.
        """
        self._background.do(self._set_link(link))

    def set_delay(self, delay_s: float) -> None:
        """Make every command arrive this much later."""
        self.delay_s = delay_s

    def cut(self) -> None:
        """Reset every connection."""
        self._background.do(self._cut())

    def trap(self, trap: Trap) -> Trap:
        """Arm it; the first trap that matches a command has it."""
        self._traps.append(trap)
        return trap

    def disarm(self) -> None:
        """Forget every trap, and let the link be up and quick."""
        self._traps.clear()
        self.delay_s = 0.0
        self.set_link("up")

    def trap_for(self, command: Command) -> Trap | None:
        """The trap this command runs into."""
        return next((trap for trap in self._traps if trap.take(command)), None)

    def seen(self, arguments: tuple[bytes, ...], peer_port: int) -> Command:
        """Count a command."""
        self._number += 1
        command = Command(self._number, arguments, peer_port)
        self.counts[command.script or command.verb] += 1
        return command

    async def healed(self) -> None:
        """Returns once the link is no longer held."""
        await self._healed.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.link == "refused":
            writer.transport.abort()
            return
        pipe = _Pipe(self, reader, writer)
        self._pipes.add(pipe)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await pipe.run()
        except asyncio.CancelledError:
            pipe.close()
        finally:
            self._pipes.discard(pipe)
            self._tasks.discard(task)

    async def _set_link(self, link: Link) -> None:
        self.link = link
        if link == "held":
            self._healed.clear()
        else:
            self._healed.set()
        for pipe in list(self._pipes):
            if link == "refused" or (link == "up" and pipe.swallowed):
                pipe.close()

    async def _cut(self) -> None:
        for pipe in list(self._pipes):
            pipe.close()

    async def _shut(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
