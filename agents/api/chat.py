"""`POST /v1/chat/completions`: OpenAI's chat API, with conversations, routes and events in its `onebox` object."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends
from starlette.responses import Response

from agents.api.idempotency import idempotency_of
from agents.api.models import resolve_model
from agents.api.plans import wanted_plan
from agents.api.replies import JsonReply, StreamReply, error_of
from agents.api.route import LeanRoute
from agents.api.schemas import ChatRequest, read_messages, turn_of
from agents.gateway import Gateway, gateway_of, principal_of
from agents.keys import Principal
from agents.llm import Meter
from agents.runs import Idempotency, RunRequest, Runs, Started, new_run_id
from agents.wire import DONE, ChunkEncoder, error_line, onebox_object, token_logprob, usage_object
from onebox.errors import OneboxError
from onebox.events import (
    Accepted,
    Completed,
    Event,
    Failed,
    Output,
    Routed,
    Stopped,
    TextDelta,
    Token,
    Usage,
)
from onebox.messages import Message

router = APIRouter(route_class=LeanRoute)
NO_USAGE = Usage(0, 0)


@dataclass(frozen=True, slots=True)
class _Whole:
    """A reply as a whole."""

    choice: dict[str, object]
    usage: Usage
    routed: Routed | None


@router.post("/v1/chat/completions", tags=["chat"])
async def complete(
    body: ChatRequest,
    gateway: Annotated[Gateway, Depends(gateway_of)],
    principal: Annotated[Principal, Depends(principal_of)],
    idempotency: Annotated[Idempotency | None, Depends(idempotency_of)],
) -> Response:
    """Answer the last message, streamed or whole."""
    sampling = body.sampling(gateway.settings, (body.top_logprobs or 0) if body.logprobs else None)
    wanted = await resolve_model(gateway, body.model)
    plan = wanted_plan(gateway, wanted, body.onebox)
    messages: tuple[Message, ...] = ()
    if not body.onebox.regenerate:
        free = wanted.raw and body.onebox.conversation is None
        messages = read_messages(body.messages, gateway.settings, ends_with_user=not free)
    request = RunRequest(
        run_id=new_run_id(),
        tenant=principal.tenant,
        messages=messages,
        task=wanted.task,
        raw=wanted.raw,
        model=wanted.model,
        plan=plan,
        params=body.onebox.params,
        sampling=sampling,
        conversation_id=body.onebox.conversation,
        background=body.onebox.background,
    )
    count_error = gateway.metrics.count_error
    if (body.n or 1) > 1:
        return JsonReply(lambda: _several(gateway, request, body), count_error)
    started = await gateway.runs.start(request, turn_of(body.onebox.conversation, body.onebox, messages), idempotency)
    if body.onebox.regenerate:
        gateway.corrections.chosen_again(request, started)
    if body.stream:
        chunks = _chunks(gateway.runs, started, body, count_error=count_error)
        return StreamReply(chunks, count_error, gateway.settings)
    return JsonReply(lambda: _one(gateway.runs, started, body), count_error)


async def _chunks(
    runs: Runs, started: Started, body: ChatRequest, *, count_error: Callable[[str], None]
) -> AsyncGenerator[bytes, None]:
    """The SSE lines of a reply; what happens before the first text waits for it, unless progress is to be shown."""
    encoder = ChunkEncoder(started.run_id, body.model, int(time.time()))
    want_events = body.onebox.events
    held: list[Event] = []
    routed: Routed | None = None
    opened = False
    usage: Usage | None = None
    async with aclosing(runs.attend(started)) as events:
        async for _, event in events:
            if type(event) is TextDelta:
                if not opened:
                    opened = True
                    yield _opening(encoder, started, routed, held)
                yield encoder.text(event)
                continue
            if isinstance(event, Failed):
                if not opened:
                    raise error_of(event)
                count_error(event.code)
                yield error_line(error_of(event))
                return
            if isinstance(event, Completed | Stopped):
                if not opened:
                    yield _opening(encoder, started, routed, held)
                if want_events and isinstance(event, Stopped):
                    yield encoder.event(event)
                yield encoder.finish(event.finish if isinstance(event, Completed) else "stop")
                if usage is not None and body.stream_options is not None and body.stream_options.include_usage:
                    yield encoder.usage(usage)
                yield DONE
                return
            if isinstance(event, Usage):
                usage = event
            elif isinstance(event, Routed):
                routed = event
            if not want_events or isinstance(event, Accepted | Usage | Output):
                continue
            if opened:
                yield encoder.event(event)
                continue
            held.append(event)
            if event.kind in ("progress", "citation", "check", "queued"):
                opened = True
                yield _opening(encoder, started, routed, held)


def _opening(encoder: ChunkEncoder, started: Started, routed: Routed | None, held: list[Event]) -> bytes:
    onebox = onebox_object(started.run_id, started.conversation_id, started.turn_id, routed)
    return encoder.opening(onebox) + b"".join(encoder.event(event) for event in held)


async def _one(runs: Runs, started: Started, body: ChatRequest) -> dict[str, object]:
    whole = await _collect(runs, started, bool(body.logprobs))
    return _completion(started, body, [whole.choice | {"index": 0}], whole.usage, whole.routed)


async def _several(gateway: Gateway, request: RunRequest, body: ChatRequest) -> dict[str, object]:
    """`n` replies to one request, side by side, after one routing."""
    routed: Routed | None = None
    if not request.raw:
        with gateway.executor.admission.passing(request.tenant) as claim:
            routed = await gateway.executor.decide(request, request.messages, Meter(), request.run_id, claim)
    several = [_nth(replace(request, routed=routed), index) for index in range(body.n or 1)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_start_and_collect(gateway.runs, each, bool(body.logprobs))) for each in several]
    except* OneboxError as errors:
        raise _first(errors) from None
    results = [task.result() for task in tasks]
    spent = sum(whole.usage.completion_tokens for _, whole in results)
    choices = [whole.choice | {"index": index} for index, (_, whole) in enumerate(results)]
    usage = Usage(results[0][1].usage.prompt_tokens, spent)
    return _completion(results[0][0], body, choices, usage, routed)


def _nth(request: RunRequest, index: int) -> RunRequest:
    seed = request.sampling.seed
    sampling = replace(request.sampling, seed=seed + index) if seed is not None else request.sampling
    return replace(request, run_id=new_run_id() if index else request.run_id, sampling=sampling)


async def _start_and_collect(runs: Runs, request: RunRequest, logprobs: bool) -> tuple[Started, _Whole]:
    started = await runs.start(request)
    return started, await _collect(runs, started, logprobs)


async def _collect(runs: Runs, started: Started, logprobs: bool) -> _Whole:
    pieces: list[str] = []
    tokens: list[Token] = []
    finish = "stop"
    usage, routed = NO_USAGE, None
    async with aclosing(runs.attend(started)) as events:
        async for _, event in events:
            if type(event) is TextDelta:
                pieces.append(event.text)
                tokens.extend(event.tokens)
            elif isinstance(event, Failed):
                raise error_of(event)
            elif isinstance(event, Completed):
                finish = event.finish
            elif isinstance(event, Usage):
                usage = event
            elif isinstance(event, Routed):
                routed = event
    choice: dict[str, object] = {
        "message": {"role": "assistant", "content": "".join(pieces), "refusal": None},
        "logprobs": {"content": [token_logprob(token) for token in tokens]} if logprobs else None,
        "finish_reason": finish,
    }
    return _Whole(choice, usage, routed)


def _completion(
    started: Started, body: ChatRequest, choices: list[dict[str, object]], usage: Usage, routed: Routed | None
) -> dict[str, object]:
    onebox = onebox_object(started.run_id, started.conversation_id, started.turn_id, routed)
    return {
        "id": started.run_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": choices,
        "usage": usage_object(usage),
        "onebox": orjson.Fragment(onebox),
    }


def _first(errors: BaseExceptionGroup[OneboxError]) -> OneboxError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
