"""`POST /v1/chat/completions`: OpenAI's chat API, with conversations, routes and events in its `onebox` object."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated
from uuid import uuid4

import orjson
from fastapi import APIRouter, Depends
from starlette.responses import Response

from agents.api.replies import JsonReply, StreamReply
from agents.api.route import LeanRoute
from agents.api.schemas import ChatRequest, read_messages
from agents.conversations import BegunTurn, Mode
from agents.gateway import Gateway, gateway_of, principal_of
from agents.keys import Principal
from agents.runs import AUTO, Run, RunRequest, check_params
from agents.wire import DONE, ChunkEncoder, error_line, onebox_object, token_logprob, usage_object
from onebox.errors import Internal, OneboxError, UnknownModel
from onebox.events import (
    Accepted,
    Completed,
    Event,
    Failed,
    TextDelta,
    Token,
    Usage,
)
from onebox.messages import Message

router = APIRouter(route_class=LeanRoute)


@router.post("/v1/chat/completions", tags=["chat"])
async def complete(
    body: ChatRequest,
    gateway: Annotated[Gateway, Depends(gateway_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """Answer the last message, streamed or whole."""
    sampling = body.sampling(gateway.settings, (body.top_logprobs or 0) if body.logprobs else None)
    task, raw = await _resolve(gateway, body.model)
    if task is not None:
        check_params(gateway.executor.plugins[task], body.onebox.params)
    messages: tuple[Message, ...] = ()
    if not body.onebox.regenerate:
        free = raw and body.onebox.conversation is None
        messages = read_messages(body.messages, gateway.settings, ends_with_user=not free)
    run_id = f"run_{uuid4().hex}"
    begun = await _begin(gateway, principal, body, run_id, messages)
    request = RunRequest(
        run_id=run_id,
        tenant=principal.tenant,
        messages=begun.messages if begun is not None else messages,
        task=task,
        raw=raw,
        params=body.onebox.params,
        sampling=sampling,
        conversation_id=begun.conversation_id if begun is not None else None,
    )
    count_error = gateway.metrics.count_error
    if (body.n or 1) > 1:
        return JsonReply(lambda: _several(gateway, request, body), count_error)
    run = gateway.executor.start(request, gateway.record(begun) if begun is not None else None)
    if body.stream:
        return StreamReply(_chunks(run, begun, body, count_error=count_error), count_error, gateway.settings)
    return JsonReply(lambda: _whole(run, begun, body), count_error)


async def _resolve(gateway: Gateway, model: str) -> tuple[str | None, bool]:
    """The pinned task, if any, and whether the engine is asked without a plugin."""
    if model == AUTO:
        return None, False
    if model in gateway.executor.plugins:
        return model, False
    card = await gateway.engine.card()
    if model == card.id:
        return None, True
    known = ", ".join(repr(name) for name in (AUTO, *gateway.executor.plugins, card.id))
    raise UnknownModel(f"Model {model!r} does not exist here; known: {known}. Choose one of these.", param="model")


async def _begin(
    gateway: Gateway, principal: Principal, body: ChatRequest, run_id: str, messages: tuple[Message, ...]
) -> BegunTurn | None:
    options = body.onebox
    if options.conversation is None:
        return None
    mode: Mode = "regenerate" if options.regenerate else "edit" if options.edit else "new"
    text = messages[-1].text if messages else ""
    return await gateway.conversations.begin_turn(
        principal.tenant, options.conversation, run_id, mode, text, options.edit
    )


async def _chunks(
    run: Run, begun: BegunTurn | None, body: ChatRequest, *, count_error: Callable[[str], None]
) -> AsyncGenerator[bytes, None]:
    """The SSE lines of a reply; what happens before the first text waits for it, unless progress is to be shown."""
    encoder = ChunkEncoder(run.request.run_id, body.model, int(time.time()))
    want_events = body.onebox.events
    held: list[Event] = []
    opened = False
    usage: Usage | None = None
    async with aclosing(run.events()) as events:
        async for event in events:
            if type(event) is TextDelta:
                if not opened:
                    opened = True
                    yield _opening(encoder, run, begun, held)
                if event.text or event.tokens:
                    yield encoder.text(event)
                continue
            if isinstance(event, Failed):
                error = run.error or Internal(event.message)
                if not opened:
                    raise error
                count_error(error.code)
                yield error_line(error)
                return
            if isinstance(event, Completed):
                if not opened:
                    yield _opening(encoder, run, begun, held)
                yield encoder.finish(event.finish)
                if usage is not None and body.stream_options is not None and body.stream_options.include_usage:
                    yield encoder.usage(usage)
                yield DONE
                return
            if isinstance(event, Usage):
                usage = event
            if not want_events or isinstance(event, Accepted | Usage):
                continue
            if opened:
                yield encoder.event(event)
                continue
            held.append(event)
            if event.kind in ("progress", "citation", "check"):
                opened = True
                yield _opening(encoder, run, begun, held)


def _opening(encoder: ChunkEncoder, run: Run, begun: BegunTurn | None, held: list[Event]) -> bytes:
    turn_id = begun.turn_id if begun is not None else None
    onebox = onebox_object(run.request.run_id, run.request.conversation_id, turn_id, run.routed)
    return encoder.opening(onebox) + b"".join(encoder.event(event) for event in held)


async def _whole(run: Run, begun: BegunTurn | None, body: ChatRequest) -> dict[str, object]:
    choice, usage = await _collect(run, bool(body.logprobs))
    turn_id = begun.turn_id if begun is not None else None
    return _completion(run, body, [choice | {"index": 0}], usage, turn_id)


async def _several(gateway: Gateway, request: RunRequest, body: ChatRequest) -> dict[str, object]:
    """`n` replies to one request, side by side, after one routing."""
    routed = None if request.raw else await gateway.executor.decide(request)
    runs = [gateway.executor.start(_nth(replace(request, routed=routed), index)) for index in range(body.n or 1)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_collect(run, bool(body.logprobs))) for run in runs]
    except* OneboxError as errors:
        raise _first(errors) from None
    results = [task.result() for task in tasks]
    usage = Usage(results[0][1].prompt_tokens, sum(spent.completion_tokens for _, spent in results))
    choices = [choice | {"index": index} for index, (choice, _) in enumerate(results)]
    return _completion(runs[0], body, choices, usage, None)


def _nth(request: RunRequest, index: int) -> RunRequest:
    seed = request.sampling.seed
    sampling = replace(request.sampling, seed=seed + index) if seed is not None else request.sampling
    return replace(request, run_id=f"{request.run_id}-{index}" if index else request.run_id, sampling=sampling)


async def _collect(run: Run, logprobs: bool) -> tuple[dict[str, object], Usage]:
    pieces: list[str] = []
    tokens: list[Token] = []
    finish = "stop"
    async with aclosing(run.events()) as events:
        async for event in events:
            if type(event) is TextDelta:
                pieces.append(event.text)
                tokens.extend(event.tokens)
            elif isinstance(event, Failed):
                raise run.error or Internal(event.message)
            elif isinstance(event, Completed):
                finish = event.finish
    choice: dict[str, object] = {
        "message": {"role": "assistant", "content": "".join(pieces), "refusal": None},
        "logprobs": {"content": [token_logprob(token) for token in tokens]} if logprobs else None,
        "finish_reason": finish,
    }
    return choice, run.usage


def _completion(
    run: Run, body: ChatRequest, choices: list[dict[str, object]], usage: Usage, turn_id: str | None
) -> dict[str, object]:
    request = run.request
    return {
        "id": request.run_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": choices,
        "usage": usage_object(usage),
        "onebox": orjson.Fragment(onebox_object(request.run_id, request.conversation_id, turn_id, run.routed)),
    }


def _first(errors: BaseExceptionGroup[OneboxError]) -> OneboxError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
