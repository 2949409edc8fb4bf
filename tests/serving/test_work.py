"""The places of one replica."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from onebox.errors import Overloaded
from onebox.settings import read_settings
from serving.scripted_engine import ScriptedEngine
from serving.server import ReplicaApp
from serving.work import Work

TOKEN = "places"
ONE = read_settings(
    engine="scripted", engine_max_ongoing=1, engine_max_queued=0, internal_token=TOKEN, scripted_ttft_ms=1
)


async def generate(app: ReplicaApp, on_last: Callable[[], Awaitable[None]]) -> int:
    """The status of one reply; `on_last` is called where its last bytes would go out."""
    body = {
        "request_id": "r",
        "messages": [{"role": "user", "content": "Hello"}],
        "sampling": {"max_tokens": 3},
    }
    requests = [{"type": "http.request", "body": orjson.dumps(body), "more_body": False}]
    status = 0

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody disconnects")

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            await on_last()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/generate",
        "headers": [(b"authorization", f"Bearer {TOKEN}".encode())],
    }
    await app(scope, receive, send)
    return status


async def test_place_is_free_before_the_end_of_its_reply_is_sent() -> None:
    app = ReplicaApp(ScriptedEngine(ONE), ONE)
    next_ones: list[int] = []

    async def nothing() -> None:
        """The end goes out at once."""

    async def another() -> None:
        next_ones.append(await generate(app, nothing))

    assert await generate(app, another) == 200
    assert next_ones == [200]


def test_place_is_given_back_once() -> None:
    work = Work(ONE)
    with work.reply() as first:
        with pytest.raises(Overloaded), work.reply():
            pass
        work.give_back(first)
        work.give_back(first)
        assert work.load("", 0.0, draining=False).running == 0
        assert work, "its last bytes are not out yet"
        with work.reply(), pytest.raises(Overloaded), work.reply():
            pass
    with work.reply(), pytest.raises(Overloaded), work.reply():
        pass
    assert not work
