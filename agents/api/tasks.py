"""`/v1/tasks` and `/v1/route`: each plugin as a typed call, and the router's decision without the work."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends
from starlette.responses import Response

from agents.api.chat import NO_USAGE
from agents.api.idempotency import idempotency_of
from agents.api.replies import JsonReply, StreamReply, error_of, json_response
from agents.api.route import LeanRoute
from agents.api.schemas import RouteRequest, TaskRequest, read_messages
from agents.gateway import Gateway, gateway_of, principal_of
from agents.keys import Principal
from agents.llm import Meter
from agents.params import check_params
from agents.runs import Idempotency, RunRequest, Runs, Started, new_run_id
from agents.wire import usage_object
from onebox.errors import BadRequest, UnknownTask
from onebox.events import Accepted, Completed, Event, Failed, Output, Queued, TextDelta, Usage, encode
from onebox.messages import Message, user
from onebox.settings import Settings

router = APIRouter(route_class=LeanRoute)


@router.get("/v1/tasks", tags=["tasks"])
async def tasks(gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """Every task with its texts in both languages, its examples and the JSON schema of its options."""
    data = [
        {
            "name": plugin.name,
            "title": {lang: text for lang, text in plugin.title.items()},
            "summary": {lang: text for lang, text in plugin.summary.items()},
            "examples": list(plugin.examples),
            "params_schema": plugin.Params.model_json_schema(),
        }
        for plugin in gateway.executor.plugins.values()
    ]
    return json_response({"data": data})


@router.post("/v1/tasks/{name}", tags=["tasks"])
async def run_task(
    name: str,
    body: TaskRequest,
    gateway: Annotated[Gateway, Depends(gateway_of)],
    principal: Annotated[Principal, Depends(principal_of)],
    idempotency: Annotated[Idempotency | None, Depends(idempotency_of)],
) -> Response:
    """Do one task; JSON, or the run's events as SSE."""
    plugin = gateway.executor.plugins.get(name)
    if plugin is None:
        known = ", ".join(repr(task) for task in gateway.executor.plugins)
        raise UnknownTask(f"Task {name!r} is not installed; known: {known}. Choose one of these.", param="name")
    check_params(plugin, body.params)
    request = RunRequest(
        run_id=new_run_id(),
        tenant=principal.tenant,
        messages=_messages(body, gateway.settings),
        task=name,
        params=body.params,
        sampling=body.sampling(gateway.settings),
    )
    started = await gateway.runs.start(request, None, idempotency)
    count_error = gateway.metrics.count_error
    if body.stream:
        return StreamReply(_lines(gateway.runs, started, count_error), count_error, gateway.settings)
    return JsonReply(lambda: _whole(gateway.runs, started, name), count_error)


@router.post("/v1/route", tags=["tasks"])
async def route(
    body: RouteRequest,
    gateway: Annotated[Gateway, Depends(gateway_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """Which task the last message is, and how sure that is."""
    request = RunRequest(new_run_id(), principal.tenant, _messages(body, gateway.settings))
    with gateway.executor.admission.passing(request.tenant) as claim:
        routed = await gateway.executor.decide(request, request.messages, Meter(), request.run_id, claim)
    return json_response(routed)


def _messages(body: TaskRequest | RouteRequest, settings: Settings) -> tuple[Message, ...]:
    if body.messages is not None:
        return read_messages(body.messages, settings)
    text = body.text or ""
    if not text.strip():
        raise BadRequest("text is blank: there is nothing to work on. Send some text.", param="text")
    return (user(text),)


async def _lines(runs: Runs, started: Started, count_error: Callable[[str], None]) -> AsyncGenerator[bytes, None]:
    """The events as SSE; those before the first output wait for it, so that a refusal is still an HTTP error."""
    held: list[bytes] | None = []
    async with aclosing(runs.attend(started)) as events:
        async for _, event in events:
            line = _line(event)
            if held is None:
                if isinstance(event, Failed):
                    count_error(event.code)
                yield line
            elif isinstance(event, Failed):
                raise error_of(event)
            elif isinstance(event, TextDelta) or event.kind in (
                "progress",
                "citation",
                "check",
                "queued",
                "completed",
                "stopped",
            ):
                yield b"".join([*held, line])
                held = None
            else:
                held.append(line)


def _line(event: Event) -> bytes:
    return b"event: " + event.kind.encode() + b"\ndata: " + encode(event) + b"\n\n"


async def _whole(runs: Runs, started: Started, name: str) -> dict[str, object]:
    pieces: list[str] = []
    others: list[orjson.Fragment] = []
    finish, usage = "stop", NO_USAGE
    async with aclosing(runs.attend(started)) as events:
        async for _, event in events:
            if isinstance(event, TextDelta):
                pieces.append(event.text)
            elif isinstance(event, Failed):
                raise error_of(event)
            elif not isinstance(event, Accepted | Output | Queued):
                others.append(orjson.Fragment(encode(event)))
            if isinstance(event, Completed):
                finish = event.finish
            elif isinstance(event, Usage):
                usage = event
    return {
        "run_id": started.run_id,
        "task": name,
        "text": "".join(pieces),
        "finish": finish,
        "usage": usage_object(usage),
        "events": others,
    }
