"""An OpenAI-shaped server that answers at a fixed pace: what peers of the gateway are measured in front of.

One token each ITL ms after a first one at TTFT ms, no model. The product is measured in front of its own scripted
engine at the same pace.
"""

import asyncio
import sys
import time

import orjson
import uvicorn
from starlette.types import Receive, Scope, Send


class PacedServer:
    """`/v1/chat/completions` and `/v1/models`; `/health` says it is up."""

    def __init__(self, ttft_ms: float, itl_ms: float) -> None:
        self._ttft_s, self._itl_s = ttft_ms / 1000, itl_ms / 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if not scope["path"].endswith("/chat/completions"):
            await _answer(send, {"object": "list", "data": [{"id": "paced", "object": "model"}]})
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = orjson.loads(body)
        tokens = asked.get("max_tokens", 64)
        if asked.get("stream"):
            await self._stream(send, tokens)
        else:
            await asyncio.sleep(self._ttft_s + tokens * self._itl_s)
            await _answer(send, _whole(tokens))

    async def _stream(self, send: Send, tokens: int) -> None:
        started = time.monotonic()
        await asyncio.sleep(self._ttft_s)
        await send(_start(b"text/event-stream"))
        for index in range(tokens):
            wait_s = started + self._ttft_s + index * self._itl_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            await send(_body(_chunk({"content": "word "}, None)))
        await send(_body(_chunk({}, "length")))
        final = {
            "id": "c",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": "paced",
            "choices": [],
            "usage": _usage(tokens),
        }
        await send(_body(b"data: " + orjson.dumps(final) + b"\n\n"))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _chunk(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "paced", "choices": [choice]}
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _whole(tokens: int) -> dict[str, object]:
    message = {"role": "assistant", "content": "word " * tokens}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    head = {"id": "c", "object": "chat.completion", "created": 0, "model": "paced"}
    return head | {"choices": [choice], "usage": _usage(tokens)}


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}


def _start(kind: bytes) -> dict[str, object]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


def _body(data: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _answer(send: Send, value: object) -> None:
    await send(_start(b"application/json"))
    await send({"type": "http.response.body", "body": orjson.dumps(value)})


if __name__ == "__main__":
    uvicorn.run(
        PacedServer(float(sys.argv[2]), float(sys.argv[3])),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
        access_log=False,
        lifespan="off",
    )
