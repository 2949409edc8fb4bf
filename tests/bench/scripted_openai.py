"""The scripted engine behind OpenAI's chat API: the workers that a router is measured in front of.

`python -m tests.bench.scripted_openai PORT`; pace and prefix cache come from the settings. `/metrics` counts whole
replies and what the prefix cache had.
"""

import sys
from contextlib import aclosing

import orjson
import uvicorn
from starlette.types import Receive, Scope, Send

from onebox.settings import read_settings
from serving.protocol import End, GenerateRequest, WireMessage, WireSampling
from serving.scripted_engine import ScriptedEngine


class Worker:
    """`/v1/chat/completions`, streamed only, `/metrics`; anything else is a model list, which says it is up."""

    def __init__(self) -> None:
        self._engine = ScriptedEngine(read_settings())
        self._served = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"].endswith("/chat/completions"):
            await self._reply(orjson.loads(await _body(receive)), send)
        elif scope["path"] == "/metrics":
            await _answer(send, b"text/plain", self._engine.metrics() + f"served_total {self._served}\n".encode())
        else:
            models = {"object": "list", "data": [{"id": "scripted", "object": "model"}]}
            await _answer(send, b"application/json", orjson.dumps(models))

    async def _reply(self, body: dict[str, object], send: Send) -> None:
        messages = tuple(WireMessage.model_validate(message) for message in body["messages"])  # type: ignore[attr-defined]  # a JSON list
        sampling = WireSampling(max_tokens=body["max_tokens"], temperature=0)  # type: ignore[arg-type]  # pydantic checks
        request = GenerateRequest(request_id="bench", messages=messages, sampling=sampling)
        self._served += 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        async with aclosing(self._engine.generate(request)) as batches:
            async for batch in batches:
                for item in batch:
                    if isinstance(item, End):
                        await _chunk(send, {}, item)
                    else:
                        await _chunk(send, {"content": item.text}, None)
                if isinstance(batch[-1], End):
                    break
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _chunk(send: Send, delta: dict[str, str], end: End | None) -> None:
    choice = {"index": 0, "delta": delta, "finish_reason": None if end is None else end.finish}
    chunk: dict[str, object] = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "scripted"}
    chunk["choices"] = [choice]
    if end is not None:
        tokens = {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.completion_tokens}
        chunk["usage"] = tokens | {"total_tokens": sum(tokens.values())}
    await send({"type": "http.response.body", "body": b"data: " + orjson.dumps(chunk) + b"\n\n", "more_body": True})


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _answer(send: Send, kind: bytes, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    uvicorn.run(Worker(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", lifespan="off")
