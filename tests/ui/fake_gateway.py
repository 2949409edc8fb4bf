"""A stand-in for the gateway: the same API out of one process's memory, with paced words and switchable faults.

Not the product's gateway and not used by the browser tests, which run the real one.
"""

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from onebox.events import (
    Accepted,
    Completed,
    Event,
    Failed,
    Progress,
    Queued,
    Routed,
    Stopped,
    TextDelta,
    encode,
    is_terminal,
)

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


@dataclass
class Run:
    """A run's log; `grown` is set anew for each entry."""

    id: str
    variant: dict[str, Any]
    turn: dict[str, Any]
    conversation: str | None
    events: list[Event] = field(default_factory=list)
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def add(self, event: Event) -> None:
        self.events.append(event)
        self.grown.set()
        self.grown = asyncio.Event()

    async def pause(self, seconds: float) -> bool:
        """Whether the run may go on."""
        try:
            await asyncio.wait_for(self.stop.wait(), seconds)
        except TimeoutError:
            return True
        return False


class FakeGateway:
    """Knobs: `ready`, `itl_s`, `ttft_s`, `words`, `fail_at` (word number), `progress` (steps before the text),
    `queued` (places before the run's turn), `lost_answers` (so many starts are stored, and their answers lost),
    `learning`, and the rows of `labels`."""

    def __init__(self, itl_s: float = 0.03, ttft_s: float = 0.05, words: int = 40) -> None:
        self.itl_s, self.ttft_s, self.words = itl_s, ttft_s, words
        self.ready, self.fail_at, self.progress, self.running = True, -1, 0, 0
        self.lost_answers = self.queued = 0
        self.learning = "off"
        self.labels: list[dict[str, Any]] = []
        self.runs: dict[str, Run] = {}
        self.keys: dict[str, str] = {}
        self.conversations: dict[str, dict[str, Any]] = {}
        self.clock = itertools.count(1)
        self.app = Starlette(
            routes=[
                Route("/readyz", self.readyz),
                Route("/v1/tasks", self.tasks),
                Route("/v1/responses", self.start, methods=["POST"]),
                Route("/v1/responses/{id}", self.follow),
                Route("/v1/responses/{id}/cancel", self.cancel, methods=["POST"]),
                Route("/v1/conversations", self.conversations_, methods=["GET", "POST"]),
                Route("/v1/conversations/{id}", self.conversation, methods=["GET", "PATCH", "DELETE"]),
                Route("/v1/conversations/{id}/export", self.export),
                Route("/v1/feedback", self.feedback, methods=["POST"]),
                Route("/v1/labels", self.labels_),
                Route("/v1/labels/learning", self.learning_, methods=["GET", "PUT"]),
                Route("/v1/labels/{id}", self.unlabel, methods=["DELETE"]),
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

    async def labels_(self, request: Request) -> Response:
        return JSONResponse({"data": self.labels, "next": None})

    async def learning_(self, request: Request) -> Response:
        if request.method == "PUT":
            self.learning = (await request.json())["learning"]
        return JSONResponse({"learning": self.learning})

    async def unlabel(self, request: Request) -> Response:
        kept = [label for label in self.labels if label["id"] != request.path_params["id"]]
        if len(kept) == len(self.labels):
            return error(404, "not_found", "No such label.")
        self.labels = kept
        return JSONResponse({})

    async def start(self, request: Request) -> Response:
        body = await request.json()
        if not self.ready:
            return error(503, "model_loading", "The model is loading. Try again in a moment.")
        key = request.headers["idempotency-key"]
        if key in self.keys:
            return self.started(self.runs[self.keys[key]])
        extra = body["onebox"]
        conversation = self.conversations.get(body.get("conversation") or "")
        turns = conversation["turns"] if conversation else []
        if turns and any(variant["state"] == "running" for variant in turns[-1]["variants"]):
            return error(409, "conflict", "A reply is still running in this conversation.")
        if extra.get("edit"):
            del turns[[t["id"] for t in turns].index(extra["edit"]) :]
        if extra.get("regenerate"):
            turn = turns[-1]
        else:
            text = body["input"][-1]["content"]
            turn = {"id": f"t{next(self.clock)}", "user": text, "created": 0, "variants": [], "chosen": 0}
            turns.append(turn)
        task = "translate" if body["model"] == "auto" else body["model"]
        tier = "head" if body["model"] == "auto" else "explicit"
        route = {"task": task, "plan": [task], "probabilities": {task: 0.97, "qa": 0.03}, "tier": tier, "ms": 4.2}
        run_id = f"resp_{next(self.clock)}"
        variant = {"run_id": run_id, "text": "", "task": task, "route": route, "state": "running"}
        turn["variants"].append(variant)
        turn["chosen"] = len(turn["variants"]) - 1
        if conversation:
            conversation["updated"] = next(self.clock)
            conversation["title"] = conversation["title"] or turn["user"][:30]
        run = Run(run_id, variant, turn, conversation["id"] if conversation else None)
        self.runs[run_id], self.keys[key] = run, run_id
        run.task = asyncio.create_task(self.write(run))
        if self.lost_answers:
            self.lost_answers -= 1
            return error(502, "engine_failed", "The answer got lost.")
        return self.started(run)

    def started(self, run: Run) -> Response:
        conversation = {"id": run.conversation} if run.conversation else None
        body = {"id": run.id, "status": "in_progress", "conversation": conversation, "onebox": {"turn": run.turn["id"]}}
        return JSONResponse(body)

    async def follow(self, request: Request) -> Response:
        run = self.runs.get(request.path_params["id"])
        if run is None:
            return error(404, "response_not_found", "No such run.")
        after = int(request.query_params.get("starting_after", -1))
        return StreamingResponse(self.told(run, after + 1), media_type="text/event-stream")

    async def told(self, run: Run, number: int) -> AsyncIterator[bytes]:
        while True:
            grown = run.grown
            for event in run.events[number:]:
                data = {"type": "onebox.event", "sequence_number": number, "event": json.loads(encode(event))}
                number += 1
                yield b"data: " + json.dumps(data).encode() + b"\n\n"
                if is_terminal(event):
                    return
            await grown.wait()

    async def cancel(self, request: Request) -> Response:
        run = self.runs[request.path_params["id"]]
        run.stop.set()
        assert run.task is not None
        await run.task
        return JSONResponse({"id": run.id, "onebox": {"event": json.loads(encode(run.events[-1]))}})

    async def write(self, run: Run) -> None:
        self.running += 1
        variant = run.variant
        run.add(Accepted(run.id, run.conversation, run.turn["id"]))
        run.add(Routed(**variant["route"] | {"plan": (variant["task"],)}))
        end = await self.end(run)
        match end:
            case Completed():
                variant["state"] = "completed"
            case Failed(code=code, message=message):
                variant["state"], variant["error"] = "failed", {"code": code, "message": message}
            case _:
                variant["state"], variant["receipt"] = "stopped", json.loads(encode(end))
        run.add(end)
        self.running -= 1

    async def end(self, run: Run) -> Event:
        for position in range(self.queued, -1, -1) if self.queued else ():
            run.add(Queued(position, 2.0 * position))
            if not await run.pause(0.2 if position else 0.0):
                return Stopped(0)
        for done in range(self.progress):
            run.add(Progress(done, self.progress, f"Part {done + 1}"))
            if not await run.pause(0.2):
                return Stopped(0)
        await asyncio.sleep(self.ttft_s)
        for i in range(self.words):
            if i == self.fail_at:
                return Failed("engine_failed", "The engine broke off the reply.", True)
            word = f"word{i} " if i else "**Hello** "
            run.variant["text"] += word
            run.add(TextDelta(word))
            if not await run.pause(self.itl_s):
                return Stopped(i + 1, self.words - i - 1, 5.0)
        return Completed()


def error(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message, "retryable": status == 503}}, status)


if __name__ == "__main__":
    uvicorn.run(FakeGateway().app, port=int(sys.argv[1]), log_level="warning")
