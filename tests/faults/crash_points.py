"""A crash before and after every store command of a run's life: the commands are counted, not sampled.

The worker which sends a command dies at it, either before the store has it or after the store executed it and before
the reply is heard. Scripts are the store commands that write; what a crash at a read leaves is what the write before
it left. Flows are what a user does meanwhile.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import aiohttp

from tests.faults.box import TENANT, Box, kill
from tests.faults.clients import Reader, Storefront
from tests.faults.history import Attempt
from tests.faults.redis_proxy import Command, Trap
from tests.faults.scripts import name_of

Moment = Literal["before", "after"]
LEASES: Final = f"onebox:{{{TENANT}}}:leases"
FIRST_OWNERS: Final = 1  # appends of the first owner before it dies
DONE_WITHIN_S: Final = 60.0


@dataclass
class Point:
    """The `number`-th time (from 0) that `script` is run for the message `nonce`, and the moment of the crash there.

    `script` None only counts. With `later` the worker that has the run dies at its second append first, and counting
    begins then: it is the next owner's commands that are struck, from its takeover on.
    """

    box: Box
    nonce: str
    script: str | None = None
    number: int = 0
    moment: Moment = "before"
    later: bool = False
    struck: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    _run: str | None = None

    def arm(self) -> None:
        """Set the trap."""
        if self.later:
            first = self.box.proxy.trap(Trap("drop_before", self._appends, skip=FIRST_OWNERS, then=self._kill))
            self._begun = first.sprung
        fate: Literal["drop_before", "drop_reply"] = "drop_before" if self.moment == "before" else "drop_reply"
        self.box.proxy.trap(Trap(fate, self._matches, skip=self.number, then=self._strike, where=self.moment))

    def _matches(self, command: Command) -> bool:
        name = name_of(command)
        self._learn(command)
        if self._run is None or (self.later and not self._begun.is_set()):
            return False
        if self._run not in command.text and not (name == "TAKE" and self._is_due()):
            return False
        if command.script is None:
            return False
        self.counts[name] += 1
        return name == self.script

    def _appends(self, command: Command) -> bool:
        self._learn(command)
        return name_of(command) == "APPEND" and self._run is not None and self._run in command.text

    def _learn(self, command: Command) -> None:
        """The run's id, from the command that stores it."""
        if self._run is None and name_of(command) == "BEGIN_RUN" and self.nonce in command.text:
            self._run = command.arguments[3 + int(command.arguments[2])].decode()

    def _is_due(self) -> bool:
        """Whether a takeover, which names no run, would take this one."""
        seconds, micros = self.box.direct.time()
        due = self.box.direct.zrangebyscore(LEASES, "-inf", seconds * 1000 + micros // 1000)
        return self._run is not None and self._run.encode() in due

    def _strike(self, command: Command) -> None:
        self._kill(command)
        self.struck.set()

    def _kill(self, command: Command) -> None:
        victim = self.box.worker_of(command)
        if victim is not None:
            kill(victim)


Flow = Callable[[aiohttp.ClientSession, Storefront, Attempt], Awaitable[None]]


async def plain(http: aiohttp.ClientSession, front: Storefront, attempt: Attempt) -> None:
    """A message and its reply."""
    await Reader(http, front, attempt).read()


async def cancelled(http: aiohttp.ClientSession, front: Storefront, attempt: Attempt) -> None:
    """A message whose reply is stopped on its way."""
    await Reader(http, front, attempt, cancel_at=4).read()


FLOWS: Final[dict[str, Flow]] = {"a reply": plain, "a stop": cancelled, "a takeover": plain}
TAKEN_OVER: Final = "a takeover"


async def play(box: Box, front: Storefront, flow: Flow, nonce: str, conversation: str, tokens: int = 10) -> Attempt:
    """One user's message with a key; the record of what they saw."""
    attempt = Attempt(0, "responses", "chat", f"Tell me about rain {nonce}", tokens, f"key-{nonce}", conversation)
    front.attempts.append(attempt)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=3, sock_read=40)
    async with aiohttp.ClientSession(front.url, headers=front.headers, timeout=timeout) as http:
        try:
            async with asyncio.timeout(DONE_WITHIN_S):
                await flow(http, front, attempt)
        except TimeoutError:
            attempt.refusals.append("patience")
    return attempt
