"""Simulated users: they send messages, read the replies as they come, lose connections, come back, and note everything.

Each behaves as a careful app does: an idempotency key per message, `starting_after` on return, patience with 503. Some
leave on purpose at a chosen event, some cancel, some use chat completions, which have no way back but the key.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import orjson

from tests.faults.history import Attempt, ChatView, Kind, Seen, View
from tests.faults.undisturbed import RAW_MODEL

PATIENCE_S: Final = 120.0
RETRY_S: Final = 0.15
REFUSED_S: Final = 0.5
SILENCE_S: Final = 40.0  # pings come every 15 s: a connection without any for this long is dead
TURNS_PER_CONVERSATION: Final = 5
FORGOTTEN_AFTER: Final = 4
AWAY: Final = "store_unavailable"
TERMINAL: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
WEIGHTS: Final[dict[Kind, int]] = {
    "responses": 30,
    "leaver": 20,
    "resender": 6,
    "canceller": 10,
    "task": 10,
    "chat": 8,
    "chat_keyed": 10,
    "chat_leaver": 6,
}
BEFORE, LAST = -2, -1  # before the first event came; at the last one
LEAVE_AT: Final = (0, 1, 12, LAST)
WORDS: Final = ("river", "lamp", "stone", "paper", "winter", "market", "letter", "garden", "window", "bridge")
CHINESE: Final = "请写一段关于河流和早晨的话"

Lost = (aiohttp.ClientError, TimeoutError, ConnectionError)


@dataclass
class Storefront:
    """The API as all users reach it, and the clock at which they stop sending."""

    url: str
    headers: dict[str, str]
    attempts: list[Attempt] = field(default_factory=list)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    open: set[aiohttp.ClientResponse] = field(default_factory=set)
    disconnects: int = 0

    def cut(self, share: float) -> int:
        """Break this share of the connections that are being read; how many."""
        victims = sorted(self.open, key=id)[: round(len(self.open) * share)]
        for answer in victims:
            answer.close()
        self.disconnects += len(victims)
        return len(victims)


class User:
    """One user with a conversation of their own."""

    def __init__(self, number: int, seed: int, front: Storefront, kinds: Sequence[Kind] | None = None) -> None:
        self.number = number
        self._seed = seed
        self._random = random.Random(f"{seed}-{number}")
        self._front = front
        self._kinds = kinds
        self._conversation: str | None = None
        self._turns = 0

    async def live(self, turns: int | None = None) -> None:
        """Send messages until the storefront closes, or `turns` of them."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=3, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(
            self._front.url, headers=self._front.headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        ) as self._http:
            while not self._front.closing.is_set() and (turns is None or self._turns < turns):
                attempt = await self._next()
                if attempt is None:
                    return
                self._front.attempts.append(attempt)
                attempt.began_at = time.monotonic()
                await self._patiently(attempt)
                if not attempt.ended:
                    self._conversation = None

    async def _patiently(self, attempt: Attempt) -> None:
        """Send, with patience until the message is acknowledged and as much again until the reply has ended."""
        sending = asyncio.create_task(self._send(attempt))
        try:
            while not sending.done():
                await asyncio.wait((sending,), timeout=0.5)
                if time.monotonic() - (attempt.acknowledged_at or attempt.began_at) > PATIENCE_S:
                    attempt.refusals.append("patience")
                    return
            await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _next(self) -> Attempt | None:
        draw = self._random
        kind = draw.choice(self._kinds) if self._kinds else draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        number, self._turns = self._turns, self._turns + 1
        words = " ".join(draw.choices(WORDS, k=draw.randrange(4, 12)))
        nonce = f"{self._seed}-{self.number}-{number}"
        prompt = f"{CHINESE} {nonce}" if draw.random() < 0.25 else f"Tell me about {words} {nonce}"
        model = "chat" if draw.random() < 0.7 else RAW_MODEL
        if kind == "task":
            model = draw.choice(("summarize", "write"))
            prompt = f"{prompt}. " + " ".join(f"{' '.join(draw.choices(WORDS, k=9)).capitalize()}." for _ in range(12))
        elif number % TURNS_PER_CONVERSATION == 0 or self._conversation is None:
            self._conversation = await self._open_conversation()
            if self._conversation is None:
                return None
        conversation = None if kind == "task" else self._conversation
        key = None if kind in ("chat", "chat_leaver") else f"key-{nonce}"
        return Attempt(self.number, kind, model, prompt, draw.randrange(40, 140), key, conversation)

    async def _open_conversation(self) -> str | None:
        while not self._front.closing.is_set():
            with suppress(*Lost):
                async with self._http.post("/v1/conversations", json={}) as answer:
                    if answer.status in (200, 201):
                        return str((await answer.json())["id"])
            await asyncio.sleep(RETRY_S)
        return None

    async def _send(self, attempt: Attempt) -> None:
        if attempt.kind.startswith("chat"):
            await self._chat(attempt)
            return
        leave_at = self._random.choice(LEAVE_AT) if attempt.kind == "leaver" else None
        leave_at = BEFORE if attempt.kind == "resender" else leave_at
        cancel_at = self._random.randrange(2, 30) if attempt.kind == "canceller" else None
        second = self._random.random() < 0.2
        async with asyncio.TaskGroup() as group:
            reader = Reader(self._http, self._front, attempt, leave_at, cancel_at)
            main = group.create_task(reader.read())
            if second:
                group.create_task(self._second(attempt, main))

    async def _second(self, attempt: Attempt, main: "asyncio.Task[None]") -> None:
        """Another tab on the same run, which comes late."""
        pause = self._random.random() * 3
        while not attempt.run_ids and not main.done():
            await asyncio.sleep(0.05)
        await asyncio.sleep(pause)
        if attempt.run_ids:
            await Reader(self._http, self._front, attempt).read()

    async def _chat(self, attempt: Attempt) -> None:
        body = {
            "model": attempt.model,
            "messages": [{"role": "user", "content": attempt.prompt}],
            "stream": True,
            "max_tokens": attempt.max_tokens,
            "onebox": {"conversation": attempt.conversation},
        }
        headers = {"Idempotency-Key": attempt.key} if attempt.key else {}
        leave_after = self._random.randrange(1, 20) if attempt.kind == "chat_leaver" else None
        while True:
            view = ChatView()
            try:
                async with self._http.post("/v1/chat/completions", json=body, headers=headers) as answer:
                    if answer.status != 200:
                        if not await _refused(answer, attempt):
                            return
                        continue
                    attempt.chats.append(view)
                    self._front.open.add(answer)
                    try:
                        await self._read_chat(answer, attempt, view, leave_after)
                    finally:
                        self._front.open.discard(answer)
            except Lost as error:
                attempt.refusals.append(type(error).__name__)
            if view.left:
                self._front.disconnects += 1
            if view.error == AWAY and attempt.key is not None:
                attempt.refusals.append(f"mid-stream {AWAY}")
            elif view.done or view.left or view.error is not None:
                attempt.ended = True
                return
            if attempt.acknowledged and attempt.key is None:
                attempt.ended = True  # a chat has no way back; the run's end is in the store
                return
            await asyncio.sleep(RETRY_S)

    async def _read_chat(
        self, answer: aiohttp.ClientResponse, attempt: Attempt, view: ChatView, leave_after: int | None
    ) -> None:
        pieces = 0
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                view.done = True
                return
            chunk = orjson.loads(line[6:])
            if "error" in chunk:
                view.error = str(chunk["error"]["code"])
                return
            if not view.opened:
                view.opened = True
                attempt.acknowledge(time.monotonic())
                attempt.run_ids.add(str(chunk["onebox"]["run_id"]))
            for choice in chunk.get("choices", ()):
                if text := choice["delta"].get("content"):
                    view.text += text
                    view.pieces_at.append(time.monotonic())
                    pieces += 1
                view.finish = choice.get("finish_reason") or view.finish
            if leave_after is not None and pieces >= leave_after:
                view.left = True
                answer.close()
                return


class Reader:
    """Reads one run to its end over as many connections as it takes. Starts it where it has no id yet."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        front: Storefront,
        attempt: Attempt,
        leave_at: int | None = None,
        cancel_at: int | None = None,
    ) -> None:
        self._http = http
        self._front = front
        self._attempt = attempt
        self._leave_at = leave_at
        self._cancel_at = cancel_at
        self._run_id: str | None = next(iter(attempt.run_ids), None)
        self._last = -1
        self._unknown = 0
        self._terminal = False

    async def read(self) -> None:
        """Until the terminal event was seen."""
        while not self._terminal:
            view = View(self._last)
            try:
                async with self._open() as answer:
                    if answer.status == 200 and self._leave_at == BEFORE:
                        self._leave_at = None
                        self._front.disconnects += 1
                        answer.close()
                    elif answer.status == 200:
                        self._attempt.views.append(view)
                        self._front.open.add(answer)
                        try:
                            await self._take(answer, view)
                        finally:
                            self._front.open.discard(answer)
                    elif answer.status == 404 and self._run_id is not None:
                        self._attempt.refusals.append("404")
                        self._unknown += 1
                        if self._unknown >= FORGOTTEN_AFTER:
                            self._attempt.forgotten = True
                            return
                    elif not await _refused(answer, self._attempt):
                        return
            except Lost as error:
                self._attempt.refusals.append(type(error).__name__)
            if not self._terminal:
                await asyncio.sleep(RETRY_S)
        self._attempt.ended = True

    def _open(self) -> Any:
        attempt = self._attempt
        if self._run_id is not None:
            query = {"stream": "true"} | ({"starting_after": str(self._last)} if self._last >= 0 else {})
            return self._http.get(f"/v1/responses/{self._run_id}", params=query)
        body: dict[str, object] = {
            "model": attempt.model,
            "input": attempt.prompt,
            "stream": True,
            "background": True,
            "max_output_tokens": attempt.max_tokens,
        }
        if attempt.conversation is not None:
            body["conversation"] = attempt.conversation
        return self._http.post("/v1/responses", json=body, headers={"Idempotency-Key": attempt.key or ""})

    async def _take(self, answer: aiohttp.ClientResponse, view: View) -> None:
        async for block in blocks(answer.content):
            seen = parse(block)
            if isinstance(seen, str):
                self._attempt.refusals.append(f"mid-stream {seen}")
                return
            if seen is None:
                continue
            view.seen.append(seen)
            self._last = seen.number
            self._attempt.acknowledge(seen.at)
            if seen.type == "response.created":
                self._run_id = str(orjson.loads(seen.raw)["response"]["id"])
                self._attempt.run_ids.add(self._run_id)
            terminal = seen.type in TERMINAL
            if self._leave_at is not None and (seen.number == self._leave_at or (self._leave_at == LAST and terminal)):
                view.ended, self._leave_at = "left", None
                self._last = seen.number - 1 if terminal else seen.number
                self._front.disconnects += 1
                answer.close()
                return
            if terminal:
                view.ended, self._terminal = "terminal", True
                return
            if self._cancel_at is not None and seen.number >= self._cancel_at:
                self._cancel_at = None
                await self._cancel()

    async def _cancel(self) -> None:
        with suppress(*Lost):
            async with self._http.post(f"/v1/responses/{self._run_id}/cancel") as answer:
                self._attempt.cancelled = answer.status == 200


async def blocks(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The server-sent events of a stream, whole ones only."""
    rest = b""
    async for chunk in content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n\n")
        for block in whole:
            yield block


def parse(block: bytes) -> Seen | str | None:
    """The event in a block; None for a comment, the code where the connection ends with an error of its own."""
    fields: dict[bytes, bytes] = {}
    for line in block.split(b"\n"):
        name, colon, value = line.partition(b": ")
        if name and colon:
            fields[name] = value
    if b"data" not in fields:
        return None
    data = orjson.loads(fields[b"data"])
    if "error" in data and b"id" not in fields:
        return str(data["error"]["code"])
    assert fields[b"id"].decode() == str(data["sequence_number"]), block
    assert fields[b"event"].decode() == data["type"], block
    delta = data["delta"] if data["type"] == "response.output_text.delta" else ""
    return Seen(data["sequence_number"], data["type"], delta, fields[b"data"], time.monotonic())


async def _refused(answer: aiohttp.ClientResponse, attempt: Attempt) -> bool:
    """Note a refusal; whether it makes sense to come again."""
    with suppress(*Lost, orjson.JSONDecodeError, KeyError, TypeError):
        code = orjson.loads(await answer.read())["error"]["code"]
        attempt.refusals.append(f"{answer.status} {code}")
    again = answer.status in (409, 429) or answer.status >= 500
    if again:
        await asyncio.sleep(RETRY_S if answer.status == 409 else REFUSED_S)
    else:
        attempt.rejected = attempt.refusals[-1] if attempt.refusals else str(answer.status)
    return again


def users(count: int, seed: int, front: Storefront, kinds: Sequence[Kind] | None = None) -> list[User]:
    """The crowd of a seed."""
    return [User(number, seed, front, kinds) for number in range(count)]
