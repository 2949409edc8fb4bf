"""`/v1/labels`: what has been learned from users' corrections: list, export, add, undo, and whether to learn at all."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Final

import orjson
from fastapi import APIRouter, Depends, Query
from pydantic import JsonValue, model_validator
from starlette.responses import Response

from agents.api.replies import json_response
from agents.api.route import LeanRoute
from agents.api.schemas import Body, ChatMessage, Identifier, Plan, read_messages
from agents.gateway import Gateway, gateway_of, principal_of
from agents.instruction import split_instruction
from agents.keys import Principal
from agents.labels import is_label_id, new_label
from agents.steps import check_plan
from onebox.errors import BadRequest, Conflict, NotFound
from onebox.labels import Label, LabelScope, LabelState, Learning
from plugins.language import LanguageDetector

router = APIRouter(route_class=LeanRoute, tags=["labels"])
TheGateway = Annotated[Gateway, Depends(gateway_of)]
Caller = Annotated[Principal, Depends(principal_of)]

UNDETERMINED: Final = "und"  # ISO 639's word for a text that is in no known language


class LabelRequest(Body):
    """`POST /v1/labels`: what is right for the last of the messages."""

    messages: list[ChatMessage]
    task: Identifier | None = None
    plan: Plan | None = None
    scope: LabelScope | None = None

    @property
    def wanted(self) -> list[str]:
        """The right tasks in order."""
        return [self.task] if self.task is not None else self.plan or []

    @model_validator(mode="after")
    def _one_answer(self) -> "LabelRequest":
        if (self.task is None) == (self.plan is None):
            raise ValueError("give exactly one of task and plan")
        return self


class LearningRequest(Body):
    """`PUT /v1/labels/learning`."""

    learning: Learning


@router.get("/v1/labels")
async def page(
    gateway: TheGateway,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=80)] = None,
) -> Response:
    """The caller's labels, newest first, each with whether the router uses it."""
    found, following = await gateway.labels.page(caller.tenant, limit, cursor)
    return json_response({"data": [_shown(gateway, label) for label in found], "next": following})


@router.get("/v1/labels/export")
async def export(gateway: TheGateway, caller: Caller) -> Response:
    """All of them, oldest first, as lines of the form that the router's own data has."""
    labels = await gateway.labels.all(caller.tenant)
    headers = {"content-disposition": 'attachment; filename="labels.jsonl"'}
    return Response(await asyncio.to_thread(_lines, labels), headers=headers, media_type="application/jsonl")


@router.post("/v1/labels")
async def add(body: LabelRequest, gateway: TheGateway, caller: Caller) -> Response:
    """Say what is right for a message; said again, it replaces what was said before."""
    messages = read_messages(body.messages, gateway.settings)
    try:
        plan = check_plan(gateway.executor.plugins, body.wanted, {})
    except BadRequest as error:
        if body.task is not None:
            error.param = "task"
        raise
    label = new_label(caller.tenant, "api", messages, plan, (), await _scope(gateway, caller.tenant, body.scope))
    await gateway.labels.add(caller.tenant, label)
    return json_response(_shown(gateway, label), 201)


@router.delete("/v1/labels/{identifier}")
async def undo(identifier: str, gateway: TheGateway, caller: Caller) -> Response:
    """Undo one: the router decides as if it had never been there."""
    if not is_label_id(identifier) or not await gateway.labels.remove(caller.tenant, identifier):
        raise NotFound(f"Label {identifier[:80]!r} does not exist. List the known ones at /v1/labels.")
    return json_response({"id": identifier, "deleted": True})


@router.get("/v1/labels/learning")
async def learning(gateway: TheGateway, caller: Caller) -> Response:
    """What the caller lets be learned."""
    return json_response({"learning": await gateway.labels.learning(caller.tenant)})


@router.put("/v1/labels/learning")
async def set_learning(body: LearningRequest, gateway: TheGateway, caller: Caller) -> Response:
    """Learn nothing, for the caller alone, or for everybody; "off" keeps the labels and does not use them."""
    await gateway.labels.set_learning(caller.tenant, body.learning)
    return json_response({"learning": body.learning})


async def _scope(gateway: Gateway, tenant: str, asked: LabelScope | None) -> LabelScope:
    """For whom a label is to be.

    Raises:
        Conflict: the tenant does not let that be learned.
    """
    allowed = await gateway.labels.learning(tenant)
    if allowed == "off":
        raise Conflict(
            "Learning is off for this tenant, so no label is kept. PUT {'learning': 'tenant'} to /v1/labels/learning "
            "first."
        )
    if asked == "global" and allowed != "global":
        raise Conflict(
            "This tenant learns for itself alone, so a label cannot be for everybody. Leave scope out, or PUT "
            "{'learning': 'global'} to /v1/labels/learning first.",
            param="scope",
        )
    return asked or allowed


def _shown(gateway: Gateway, label: Label) -> dict[str, JsonValue]:
    return LabelState(label, gateway.feed.reason(label)).to_json()


def _lines(labels: Sequence[Label]) -> bytes:
    detector = LanguageDetector()
    return b"".join(_line(label, detector) for label in labels)


def _line(label: Label, detector: LanguageDetector) -> bytes:
    right: dict[str, object] = {"task": label.plan[0]} if len(label.plan) == 1 else {"plan": label.plan}
    asked = label.messages[-1].text
    # A pasted text may be in another language than the user's own words.
    language = detector.detect(split_instruction(asked).text or asked)
    line: dict[str, object] = {
        "id": label.id,
        "messages": [{"role": message.role, "content": message.text} for message in label.messages],
        **right,
        "lang": language.code if language is not None else UNDETERMINED,
    }
    return orjson.dumps(line) + b"\n"
