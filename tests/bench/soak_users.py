"""The crowd of the soak: users of the API, and a visitor of the page.

Each does one thing after the other, all that people do, and counts in a `Tally` how it ended. Conversations are
deleted, for they would be kept for good.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from tests.product import KEY, Product

SEED = 5
THINK_S = 1.0
IDLE_CONNECTION_S = 3.0  # less than the gateway keeps one, and then the next may be another worker's
TOKENS = (16, 64)
CHAT_END = (b"data: [DONE]",)
RESPONSE_END = (b"event: response.completed", b"event: response.incomplete")
TASK_END = (b"event: completed",)
FAILURES = (b'data: {"error"', b'data: {"type":"response.failed"')
TASK_FAILURE = b'"kind":"failed"}'
REFUSALS = (b'"overloaded"', b'"rate_limited"')
KINDS = {"chat": 30, "response": 20, "conversation": 12, "task": 16, "stop": 10, "leave": 12}
TEXTS = (
    "Tell me about the river in spring, and what the people of the town do there, number {}.",
    "Why do lighthouses stand where they stand? Question {}.",
    "写一段关于河流和早晨的话，编号 {}。",
    "为什么春天的市场这么热闹？第 {} 个问题。",
)


class Broken(Exception):
    """What a user should not have to see; the message is its kind."""


@dataclass(slots=True)
class Tally:
    """What all users have met so far."""

    ending: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0
    done: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    unclean: int = 0
    refused_in_stream: Counter[str] = field(default_factory=Counter)  # by route
    cut: int = 0
    broken: Counter[str] = field(default_factory=Counter)


class User:
    """Somebody with a browser: one thing after the other, each to its end, with a pause between."""

    def __init__(self, number: int, url: str, tasks: Sequence[tuple[str, str]], tally: Tally) -> None:
        self._number = number
        self._draw = random.Random(f"{SEED}-{number}")
        self._url = url
        self._tasks = tasks
        self._tally = tally
        self._asked = 0

    async def live(self) -> None:
        """Use the box until the tally says that it ends."""
        doings = {
            "chat": self._chat,
            "response": self._respond,
            "conversation": self._converse,
            "task": self._task,
            "stop": self._stop,
            "leave": self._leave,
        }
        headers = {"authorization": f"Bearer {KEY}"}
        timeout = aiohttp.ClientTimeout(total=180)
        async with aiohttp.ClientSession(
            self._url,
            headers=headers,
            timeout=timeout,
            connector=aiohttp.TCPConnector(keepalive_timeout=IDLE_CONNECTION_S),
        ) as self._http:
            while not self._tally.ending.is_set():
                kind = self._draw.choices(list(KINDS), list(KINDS.values()))[0]
                try:
                    if await doings[kind]():
                        self._tally.done[kind] += 1
                except Broken as error:
                    self._tally.broken[f"{kind}: {error}"] += 1
                except (aiohttp.ClientError, TimeoutError) as error:
                    self._tally.broken[f"{kind}: {type(error).__name__}"] += 1
                await asyncio.sleep(self._draw.expovariate(1 / THINK_S))

    async def _chat(self) -> bool:
        body = self._chat_body(self._draw.choice(("auto", "chat", "scripted")))
        return await self._stream("POST", "/v1/chat/completions", body, CHAT_END)

    async def _leave(self) -> bool:
        most = self._draw.randrange(1, TOKENS[0])
        body = self._chat_body("chat")
        return await self._stream("POST", "/v1/chat/completions", body, CHAT_END, leave_after=most)

    async def _respond(self) -> bool:
        run = await self._start()
        if run is None:
            return False
        whole = await self._stream("GET", f"{run}?stream=true", None, RESPONSE_END)
        if self._draw.random() < 0.5:
            await self._call("DELETE", run)
        return whole

    async def _stop(self) -> bool:
        run = await self._start()
        if run is None:
            return False
        cancelling = asyncio.create_task(self._cancel(run, self._draw.uniform(0.0, 0.8)))
        try:
            return await self._stream("GET", f"{run}?stream=true", None, RESPONSE_END)
        finally:
            await cancelling

    async def _cancel(self, run: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self._call("POST", f"{run}/cancel")

    async def _converse(self) -> bool:
        """A few turns, a second variant, a like; then it is deleted, at times while its last reply is being written."""
        made = await self._call("POST", "/v1/conversations", {})
        if made is None:
            return False
        path = f"/v1/conversations/{made['id']}"
        try:
            for _ in range(self._draw.randrange(2, 5)):
                if not await self._turn(str(made["id"])):
                    return False
            if self._draw.random() < 0.5:
                await self._turn(str(made["id"]), regenerate=True)
            kept = await self._call("GET", path)
            if kept is not None:
                liked = kept["turns"][-1]["variants"][-1]["run_id"]
                rating = {"conversation": made["id"], "run_id": liked, "value": "like"}
                await self._call("POST", "/v1/feedback", rating)
            if self._draw.random() < 0.3:
                await self._turn(str(made["id"]), leave_after=self._draw.randrange(1, TOKENS[0]))
            return True
        finally:
            await self._call("DELETE", path)

    async def _turn(self, conversation: str, *, regenerate: bool = False, leave_after: int | None = None) -> bool:
        body = self._chat_body("chat", conversation=conversation, regenerate=regenerate)
        return await self._stream("POST", "/v1/chat/completions", body, CHAT_END, leave_after=leave_after)

    async def _task(self) -> bool:
        name, text = self._draw.choice(self._tasks)
        body = {"text": text, "max_tokens": self._draw.randrange(*TOKENS)}
        if self._draw.random() < 0.5:
            return await self._call("POST", f"/v1/tasks/{name}", body) is not None
        return await self._stream("POST", f"/v1/tasks/{name}", body | {"stream": True}, TASK_END)

    async def _start(self) -> str | None:
        """The path of a run in the background; half of them under an idempotency key."""
        body = {
            "model": self._draw.choice(("auto", "chat")),
            "input": self._text(),
            "max_output_tokens": self._draw.randrange(*TOKENS),
            "background": True,
        }
        key = f"{self._number}-{self._asked}" if self._draw.random() < 0.5 else None
        made = await self._call("POST", "/v1/responses", body, key)
        return f"/v1/responses/{made['id']}" if made is not None else None

    def _chat_body(self, model: str, **onebox: object) -> dict[str, object]:
        return {
            "model": model,
            "messages": [] if onebox.get("regenerate") else [{"role": "user", "content": self._text()}],
            "max_tokens": self._draw.randrange(*TOKENS),
            "stream": True,
            "onebox": {"events": self._draw.random() < 0.5, **onebox},
        }

    def _text(self) -> str:
        self._asked += 1
        return self._draw.choice(TEXTS).format(f"{self._number}-{self._asked}")

    async def _call(self, method: str, path: str, body: object = None, key: str | None = None) -> dict[str, Any] | None:
        """The answer; None where the end came before anybody had time for it."""
        async with self._request(method, path, body, key) as response:
            if response is None:
                return None
            content = await response.read()
            return orjson.loads(content) if content else {}

    async def _stream(
        self, method: str, path: str, body: object = None, last: tuple[bytes, ...] = (), leave_after: int | None = None
    ) -> bool:
        """Whether the stream came to a line that begins as one of `last`, or was left after so many events."""
        seen, whole, failure = 0, False, b""
        async with self._request(method, path, body) as response:
            if response is None:
                return False
            with suppress(aiohttp.ClientPayloadError):
                async for line in response.content:
                    seen += line.startswith(b"data: ")
                    whole = whole or line.startswith(last)
                    if line.startswith(FAILURES) or line.rstrip().endswith(TASK_FAILURE):
                        failure = line
                    if seen == leave_after:
                        response.close()
                        return True
        if failure and any(code in failure for code in REFUSALS):
            self._tally.refused_in_stream["/".join(path.split("/")[:3])] += 1
        elif failure or not whole:
            self._tally.cut += 1
            raise Broken(f"cut {failure[:200].decode(errors='replace')}")
        return whole

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: object = None, key: str | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse | None]:
        """A response that is no error, after as many refusals as there are; None if all ends before."""
        headers = {"Idempotency-Key": key} if key else None
        while True:
            self._tally.requests += 1
            async with self._http.request(method, path, json=body, headers=headers) as response:
                if response.status < 400:
                    yield response
                    return
                pause_s = await self._refusal(response)
            if self._tally.ending.is_set():
                yield None
                return
            await asyncio.sleep(pause_s)

    async def _refusal(self, response: aiohttp.ClientResponse) -> float:
        """When to come back. Raises `Broken` on an error that is no refusal."""
        if response.status not in (429, 503):
            raise Broken(f"{response.status} {(await response.text())[:200]}")
        self._tally.refused += 1
        after = response.headers.get("retry-after", "")
        with suppress(aiohttp.ContentTypeError, ValueError, KeyError):
            if after.isdigit() and (await response.json())["error"]["message"]:
                return float(after)
        self._tally.unclean += 1
        return 1.0


class Visitor:
    """Somebody at the page, by Gradio's protocol: opens it, sends a message, reads the reply, leaves."""

    def __init__(self, ours: Product, tally: Tally) -> None:
        self._product = ours
        self._tally = tally
        self._events: dict[str, int] = {}

    async def live(self) -> None:
        """Visit the page again and again until the tally says that it ends."""
        headers = {"authorization": f"Bearer {KEY}"}
        timeout = aiohttp.ClientTimeout(total=180)
        async with (
            aiohttp.ClientSession(self._product.ui_url, timeout=timeout, read_bufsize=1 << 22) as page,
            aiohttp.ClientSession(self._product.api_url, timeout=timeout, headers=headers) as api,
        ):
            async with page.get("/config") as response:
                self._events = {each["api_name"]: each["id"] for each in (await response.json())["dependencies"]}
            number = 0
            while not self._tally.ending.is_set():
                number += 1
                try:
                    await self._visit(page, api, number)
                except Broken as error:
                    self._tally.broken[f"page: {error}"] += 1
                except (aiohttp.ClientError, TimeoutError) as error:
                    self._tally.broken[f"page: {type(error).__name__}"] += 1
                else:
                    self._tally.done["page"] += 1
                await asyncio.sleep(THINK_S)

    async def _visit(self, page: aiohttp.ClientSession, api: aiohttp.ClientSession, number: int) -> None:
        session, title = f"soak{number}", f"Visit {number}x"
        async with page.get("/") as response:
            await response.read()
        try:
            async with page.get(f"/gradio_api/heartbeat/{session}"):  # it ends where the browser's tab does
                await self._call(page, session, "load", ["{}"])
                await self._call(page, session, "on_send", ["", "en", None, f"{title}: why is it raining?", "qa", ""])
        finally:
            async with api.get("/v1/conversations", params={"q": title}) as response:
                found = (await response.json())["data"]
            for each in found:
                async with api.delete(f"/v1/conversations/{each['id']}") as response:
                    await response.read()

    async def _call(self, page: aiohttp.ClientSession, session: str, event: str, data: Sequence[object]) -> None:
        body = {"fn_index": self._events[event], "session_hash": session, "data": data, "event_data": None}
        async with page.post("/gradio_api/queue/join", json=body) as response:
            await response.read()
        whole = False
        async with page.get("/gradio_api/queue/data", params={"session_hash": session}) as response:
            async for line in response.content:
                whole = whole or (b'"process_completed"' in line and b'"success":true' in line)
        if not whole:
            raise Broken(f"event {event} did not succeed")
