"""A small client of the engine wire for the contract tests; the product's own is `agents.engine`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

import httpx
import orjson

Line = dict[str, object]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer: its lines as they came, the last one the terminal."""

    lines: tuple[Line, ...]

    @property
    def frames(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if "text" in line)

    @property
    def text(self) -> str:
        return "".join(str(frame["text"]) for frame in self.frames)

    @property
    def ids(self) -> list[int]:
        return [int(i) for frame in self.frames for i in frame["ids"]]  # type: ignore[attr-defined]  # JSON list

    @property
    def end(self) -> Line:
        return self.lines[-1]


@dataclass(frozen=True, slots=True)
class Wire:
    """One engine, however it is served."""

    url: str
    token: str
    context_length: int
    places: int

    @asynccontextmanager
    async def client(self, token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"authorization": f"Bearer {self.token if token is None else token}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60, limits=limits) as client:
            yield client

    async def generate(self, content: str = "Tell me about rivers.", **fields: object) -> Reply:
        async with self.client() as client:
            response = await client.post("/v1/generate", json=request(content, **fields))
        assert response.status_code == 200, response.text
        return Reply(tuple(orjson.loads(line) for line in response.content.splitlines()))

    async def refused(self, content: str = "hello", **fields: object) -> httpx.Response:
        async with self.client() as client:
            return await client.post("/v1/generate", json=request(content, **fields))

    async def running(self) -> int:
        """Requests being answered or waiting, by the replica's gauges."""
        async with self.client() as client:
            metrics = dict(line.rsplit(" ", 1) for line in (await client.get("/metrics")).text.splitlines())
        return int(float(metrics["onebox_engine_running"]) + float(metrics["onebox_engine_waiting"]))


def request(content: str, **fields: object) -> dict[str, object]:
    """A generate body: greedy, 32 tokens, unless `fields` say otherwise."""
    sampling = {"max_tokens": 32, "temperature": 0}
    sampling.update(fields.pop("sampling", {}))  # type: ignore[call-overload]  # a JSON object
    return {
        "request_id": uuid4().hex,
        "messages": [{"role": "user", "content": content}],
        "sampling": sampling,
        **fields,
    }
