"""A stand-in for the gateway: the same API out of one process's memory, with paced words and switchable faults.

Not the product's gateway and not used by the browser tests, which run the real one.
"""

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TITLES = {
    "summarize": ("Summarize", "总结"),
    "translate": ("Translate", "翻译"),
    "qa": ("Answer", "问答"),
    "reason": ("Reason", "推理"),
    "write": ("Write", "写作"),
    "chat": ("Chat", "聊天"),
}
EXAMPLES = {
    "summarize": ("Summarize this article in three sentences", "把这篇文章总结成三句话"),
    "translate": ("Translate to Chinese: The library opens at nine.", "翻译成英文：图书馆九点开门。"),
    "qa": ("Why is the sky blue?", "天空为什么是蓝色的？"),
    "reason": (
        "A train leaves at 9:40 and takes 95 minutes. When does it arrive?",
        "火车9:40出发，行驶95分钟，几点到？",
    ),
    "write": ("Write a short poem about autumn rain", "写一首关于秋雨的短诗"),
    "chat": ("Hello! What can you do?", "你好！你能做什么？"),
}


class FakeGateway:
    """Knobs: `ready`, `itl_s`, `ttft_s`, `words`, `fail_at` (word number), `progress` (steps before the text)."""

    def __init__(self, itl_s: float = 0.03, ttft_s: float = 0.05, words: int = 40) -> None:
        self.itl_s, self.ttft_s, self.words = itl_s, ttft_s, words
        self.ready, self.fail_at, self.progress, self.running = True, -1, 0, 0
        self.conversations: dict[str, dict[str, Any]] = {}
        self.clock = itertools.count(1)
        self.app = Starlette(
            routes=[
                Route("/readyz", self.readyz),
                Route("/v1/tasks", self.tasks),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/conversations", self.conversations_, methods=["GET", "POST"]),
                Route("/v1/conversations/{id}", self.conversation, methods=["GET", "PATCH", "DELETE"]),
                Route("/v1/conversations/{id}/export", self.export),
                Route("/v1/feedback", self.feedback, methods=["POST"]),
                Route("/knobs", self.knobs, methods=["GET", "POST"]),
            ]
        )

    async def knobs(self, request: Request) -> Response:
        if request.method == "POST":
            for name, value in (await request.json()).items():
                setattr(self, name, value)
        return JSONResponse({"running": self.running, "conversations": len(self.conversations)})

    async def readyz(self, request: Request) -> Response:
        state = {"ready": self.ready, "store": "ok", "engine": "ready" if self.ready else "loading", "model": "fake"}
        return JSONResponse(state, 200 if self.ready else 503)

    async def tasks(self, request: Request) -> Response:
        data = [
            {
                "name": name,
                "title": {"en": en, "zh": zh},
                "summary": {"en": en, "zh": zh},
                "examples": [
                    {"lang": "en", "text": EXAMPLES[name][0]},
                    {"lang": "zh", "text": EXAMPLES[name][1]},
                ],
                "params_schema": {},
            }
            for name, (en, zh) in TITLES.items()
        ]
        return JSONResponse({"data": data})

    async def conversations_(self, request: Request) -> Response:
        if request.method == "POST":
            number = next(self.clock)
            body = await request.json()
            made = {"id": f"c{number}", "title": body.get("title"), "created": number, "updated": number, "turns": []}
            self.conversations[made["id"]] = made
            return JSONResponse(made)
        rows = sorted(self.conversations.values(), key=lambda c: -c["updated"])
        return JSONResponse({"data": [{**c, "turns": len(c["turns"])} for c in rows], "next": None})

    async def conversation(self, request: Request) -> Response:
        found = self.conversations.get(request.path_params["id"])
        if found is None:
            return error(404, "conversation_not_found", "No such conversation.")
        if request.method == "DELETE":
            del self.conversations[found["id"]]
        if request.method == "PATCH":
            found["title"] = (await request.json())["title"]
        return JSONResponse(found)

    async def export(self, request: Request) -> Response:
        return JSONResponse(self.conversations[request.path_params["id"]])

    async def feedback(self, request: Request) -> Response:
        body = await request.json()
        for turn in self.conversations[body["conversation"]]["turns"]:
            for variant in turn["variants"]:
                if variant["run_id"] == body["run_id"]:
                    variant["feedback"] = body["value"]
        return JSONResponse({})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        if not self.ready:
            return error(503, "model_loading", "The model is loading. Try again in a moment.")
        extra = body["onebox"]
        conversation = self.conversations.get(extra["conversation"] or "")
        turns = conversation["turns"] if conversation else []
        if extra.get("edit"):
            del turns[[t["id"] for t in turns].index(extra["edit"]) :]
        if extra.get("regenerate"):
            turn = turns[-1]
        else:
            text = body["messages"][-1]["content"]
            turn = {"id": f"t{next(self.clock)}", "user": text, "created": 0, "variants": [], "chosen": 0}
            turns.append(turn)
        task = "translate" if body["model"] == "auto" else body["model"]
        route = {"task": task, "plan": [task], "probabilities": {task: 0.97, "qa": 0.03}, "tier": "head", "ms": 4.2}
        route["tier"] = "head" if body["model"] == "auto" else "explicit"
        variant = {"run_id": f"r{next(self.clock)}", "text": "", "task": task, "route": route, "state": "running"}
        turn["variants"].append(variant)
        turn["chosen"] = len(turn["variants"]) - 1
        if conversation:
            conversation["updated"] = next(self.clock)
            conversation["title"] = conversation["title"] or turn["user"][:30]
        return StreamingResponse(self.reply(variant, conversation, turn), media_type="text/event-stream")

    async def reply(self, variant: dict[str, Any], conversation: Any, turn: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            head = {"run_id": variant["run_id"], "route": variant["route"], "turn": turn["id"]}
            head["conversation"] = conversation["id"] if conversation else None
            yield chunk([{"index": 0, "delta": {"role": "assistant"}}], head)
            for done in range(self.progress):
                event = {"kind": "progress", "done": done, "total": self.progress, "label": f"Part {done + 1}"}
                yield chunk([], {"event": event})
                await asyncio.sleep(0.2)
            await asyncio.sleep(self.ttft_s)
            for i in range(self.words):
                if i == self.fail_at:
                    variant["state"] = "failed"
                    failure = {"code": "engine_failed", "message": "The engine broke off the reply.", "retryable": True}
                    variant["error"] = failure
                    yield b"data: " + json.dumps({"error": failure}).encode() + b"\n\n"
                    return
                word = f"word{i} " if i else "**Hello** "
                variant["text"] += word
                yield chunk([{"index": 0, "delta": {"content": word}}])
                await asyncio.sleep(self.itl_s)
            variant["state"] = "completed"
            yield chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
            yield b"data: [DONE]\n\n"
        finally:
            self.running -= 1
            if variant["state"] == "running":
                variant["state"] = "stopped"


def chunk(choices: list[dict[str, Any]], onebox: dict[str, Any] | None = None) -> bytes:
    body: dict[str, Any] = {"object": "chat.completion.chunk", "choices": choices}
    if onebox:
        body["onebox"] = onebox
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def error(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message, "retryable": status == 503}}, status)


if __name__ == "__main__":
    uvicorn.run(FakeGateway().app, port=int(sys.argv[1]), log_level="warning")
