"""`/v1/responses`: OpenAI's Responses API is the API of durable runs.

A response is a run and its events are the run's, with the same numbers; what they look like is
`agents.responses_wire`. Starting, stopping and reading runs is `agents.runs`.
"""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Header, Query
from starlette.responses import Response

from agents.api.idempotency import idempotency_of
from agents.api.models import resolve_model
from agents.api.plans import change_plan, wanted_plan
from agents.api.replies import JsonReply, StreamReply, error_of, json_response
from agents.api.route import LeanRoute
from agents.api.schemas import PlanRequest, ResponseRequest, check_messages, turn_of
from agents.execution import AUTO
from agents.gateway import Gateway, gateway_of, principal_of
from agents.keys import Principal
from agents.responses_wire import ResponseEncoder, ResponseFields, fields_of
from agents.run_store import Idempotency, RunRecord, RunRequest, new_run_id, unknown_run
from agents.runs import Started
from onebox.errors import BadRequest, Conflict
from onebox.events import Accepted, Check, Citation, Completed, Failed, Output, Progress, Queued, Stopped, TextDelta
from onebox.messages import Message, assistant, system

router = APIRouter(route_class=LeanRoute, tags=["responses"])
TheGateway = Annotated[Gateway, Depends(gateway_of)]
Caller = Annotated[Principal, Depends(principal_of)]

# OpenAI's client takes a comment and a blank line, after an `id:`, for an event without data.
NOTHING_LEFT: Final = b": end\n"
_RUN_ID: Final = re.compile(r"resp_[0-9a-f]{1,96}(-[0-9]{1,3})?")
_SHOWN: Final = (TextDelta, Output, Queued, Progress, Citation, Check, Completed, Stopped)


@router.post("/v1/responses")
async def create(
    body: ResponseRequest,
    gateway: TheGateway,
    caller: Caller,
    idempotency: Annotated[Idempotency | None, Depends(idempotency_of)],
) -> Response:
    """Start a run, or join the one that the idempotency key has, and answer with its events, its end or itself."""
    wanted = await resolve_model(gateway, body.model)
    plan = wanted_plan(gateway, wanted, body.onebox)
    sampling = body.sampling(gateway.settings)
    messages, fields = await _messages(gateway, caller, body, wanted.raw), _fields(body)
    request = RunRequest(
        run_id=new_run_id(),
        tenant=caller.tenant,
        messages=messages,
        task=wanted.task,
        raw=wanted.raw,
        model=wanted.model,
        plan=plan,
        params=body.onebox.params,
        sampling=sampling,
        conversation_id=body.conversation_id,
        background=bool(body.background),
        extra=fields.to_extra(),
    )
    started = await gateway.runs.start(request, turn_of(body.conversation_id, body.onebox, messages), idempotency)
    if body.onebox.regenerate:
        gateway.corrections.chosen_again(request, started)
    encoder = ResponseEncoder(
        started.run_id, started.created, fields, background=request.background, streamed=bool(body.stream)
    )
    count_error = gateway.metrics.count_error
    if body.stream:
        pieces = _attended(gateway, started, encoder, hold=not request.background)
        return StreamReply(pieces, count_error, gateway.settings)
    if started.joined and body.background:
        return json_response(await _object(gateway, started.tenant, started.run_id))
    if body.background:
        encoder.note(Accepted(started.run_id, started.conversation_id, started.turn_id))
        return json_response(encoder.response())
    return JsonReply(lambda: _whole(gateway, started, encoder), count_error)


@router.get("/v1/responses/{run_id}")
async def retrieve(
    run_id: str,
    gateway: TheGateway,
    caller: Caller,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """The response as it is, or its events behind `starting_after`, as they were and as they come."""
    check_run_id(run_id)
    if not stream:
        return json_response(await _object(gateway, caller.tenant, run_id))
    after = starting_after if starting_after is not None else _number(last_event_id)
    pieces = _followed(gateway, caller.tenant, run_id, after)
    return StreamReply(pieces, gateway.metrics.count_error, gateway.settings)


@router.post("/v1/responses/{run_id}/cancel")
async def cancel(run_id: str, gateway: TheGateway, caller: Caller) -> Response:
    """Stop the run wherever it is; one that has ended stays as it is."""
    check_run_id(run_id)
    await gateway.runs.stop(caller.tenant, run_id)
    return json_response(await _object(gateway, caller.tenant, run_id))


@router.put("/v1/responses/{run_id}/plan")
async def replan(run_id: str, body: PlanRequest, gateway: TheGateway, caller: Caller) -> Response:
    """Change the steps that have not begun."""
    check_run_id(run_id)
    plan = await change_plan(gateway, caller.tenant, run_id, body.plan)
    return json_response({"id": run_id, "plan": plan})


@router.delete("/v1/responses/{run_id}")
async def delete(run_id: str, gateway: TheGateway, caller: Caller) -> Response:
    """Stop the run and forget its log; a conversation keeps the reply."""
    check_run_id(run_id)
    await gateway.runs.delete(caller.tenant, run_id)
    return json_response({"id": run_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{run_id}/input_items")
async def input_items(
    run_id: str,
    gateway: TheGateway,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=128)] = None,
) -> Response:
    """The messages the run answers, without `instructions`."""
    check_run_id(run_id)
    record = await gateway.runs.record(caller.tenant, run_id)
    prefix = f"msg_{run_id.removeprefix('resp_')}_in"
    items = [_item(f"{prefix}{index}", message) for index, message in enumerate(_asked(record))]
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            raise BadRequest(
                f"Item {after!r} is not an input of this response. Take 'last_id' of a page.", param="after"
            )
        items = items[places[0] + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": "", "last_id": ""}
    return json_response({"object": "list", "data": page, "has_more": len(items) > limit, **ends})


def check_run_id(run_id: str) -> None:
    """Return when there can be such a run.

    Raises:
        UnknownRun: no run has a name like that.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise unknown_run(run_id)


async def _messages(gateway: Gateway, caller: Principal, body: ResponseRequest, raw: bool) -> tuple[Message, ...]:
    """What the run answers; of a conversation the new message alone, as the rest is stored."""
    if body.conversation_id is not None:
        if body.instructions:
            raise BadRequest(
                "instructions cannot be given with a conversation: its turns are answered as the task does. "
                "Leave one of them out.",
                param="instructions",
            )
        if body.onebox.regenerate:
            return ()
        check_messages(body.messages, gateway.settings, "input")
        return body.messages
    earlier = await _earlier(gateway, caller.tenant, body.previous_response_id) if body.previous_response_id else ()
    check_messages(body.messages, gateway.settings, "input", ends_with_user=not raw)
    leading = (system(body.instructions),) if body.instructions else ()
    messages = (*leading, *earlier, *body.messages)
    check_messages(messages, gateway.settings, "input", ends_with_user=not raw)
    return messages


async def _earlier(gateway: Gateway, tenant: str, run_id: str) -> tuple[Message, ...]:
    """The messages of a run and its reply; a question that got none is left out, as templates want turns."""
    check_run_id(run_id)
    record = await gateway.runs.record(tenant, run_id)
    if record.state == "running":
        raise Conflict(
            f"Response {run_id!r} is still being written, so nothing can follow it yet. Wait for its end or cancel it.",
            retry_after_s=1.0,
            param="previous_response_id",
        )
    events = await gateway.runs.events(tenant, run_id)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    messages = _asked(record)
    if text:
        return (*messages, assistant(text))
    return messages[:-1] if messages and messages[-1].role == "user" else messages


def _asked(record: RunRecord) -> tuple[Message, ...]:
    """The run's messages without its own instructions, which do not pass on."""
    messages = record.request.messages
    return messages[1:] if _fields_of(record).instructions else messages


def _fields(body: ResponseRequest) -> ResponseFields:
    return ResponseFields(
        model=body.model,
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        max_output_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_logprobs=body.top_logprobs,
        metadata=body.metadata,
        store=body.store is not False,
    )


def _fields_of(record: RunRecord) -> ResponseFields:
    return fields_of(record.request.extra, record.request.task or AUTO)


def _encoder(record: RunRecord, *, streamed: bool = False) -> ResponseEncoder:
    background = record.request.background
    return ResponseEncoder(record.run_id, record.created, _fields_of(record), background=background, streamed=streamed)


async def _object(gateway: Gateway, tenant: str, run_id: str) -> dict[str, object]:
    """The response object as of now."""
    encoder = _encoder(await gateway.runs.record(tenant, run_id))
    for event in await gateway.runs.events(tenant, run_id):
        encoder.note(event)
    return encoder.response()


async def _whole(gateway: Gateway, started: Started, encoder: ResponseEncoder) -> dict[str, object]:
    """The response object at the run's end. Raises the run's error where it has no text at all."""
    async with aclosing(gateway.runs.attend(started)) as events:
        async for _, event in events:
            encoder.note(event)
    if isinstance(encoder.terminal, Failed) and not encoder.text:
        raise error_of(encoder.terminal)
    return encoder.response()


async def _attended(
    gateway: Gateway, started: Started, encoder: ResponseEncoder, *, hold: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a run for whoever asked for it; `hold` keeps those before the first to show until that one."""
    held: list[bytes] | None = [] if hold else None
    async with aclosing(gateway.runs.attend(started)) as events:
        async for number, event in events:
            block = encoder.encode(number, event)
            if held is None:
                if isinstance(event, Failed):
                    gateway.metrics.count_error(event.code)
                yield block
            elif isinstance(event, Failed):
                raise error_of(event)
            elif isinstance(event, _SHOWN):
                yield b"".join((*held, block))
                held = None
            else:
                held.append(block)


async def _followed(gateway: Gateway, tenant: str, run_id: str, after: int = -1) -> AsyncGenerator[bytes, None]:
    """The events numbered above `after`, from the log as it is and as it grows; a comment where there is none."""
    encoder = _encoder(await gateway.runs.record(tenant, run_id), streamed=True)
    begun = told = False
    async with aclosing(gateway.runs.follow(tenant, run_id)) as events:
        async for number, event in events:
            if number > after:
                begun = told = True
                yield encoder.encode(number, event)
                continue
            encoder.note(event)
            if not begun:
                begun = True
                yield b""
    if not told:
        yield NOTHING_LEFT


def _number(last_event_id: str | None) -> int:
    if not last_event_id:
        return -1
    if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) < 17):
        raise BadRequest(
            f"Last-Event-ID {last_event_id[:40]!r} is not the number of an event. Send the `id:` of the last one seen.",
            param="Last-Event-ID",
        )
    return int(last_event_id)


def _item(identifier: str, message: Message) -> dict[str, object]:
    text: dict[str, object] = {"type": "input_text", "text": message.text}
    if message.role == "assistant":
        text = {"type": "output_text", "text": message.text, "annotations": [], "logprobs": []}
    return {"id": identifier, "type": "message", "role": message.role, "status": "completed", "content": [text]}
