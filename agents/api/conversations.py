"""`/v1/conversations`: list, search, read, rename, export and delete. A turn is added by `agents.api.chat`."""

from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from agents.api.replies import json_response
from agents.api.route import LeanRoute
from agents.api.schemas import ConversationRequest, RenameRequest
from agents.conversations import Conversation, Summary, Turn
from agents.gateway import Gateway, gateway_of, principal_of
from agents.keys import Principal

router = APIRouter(route_class=LeanRoute, tags=["conversations"])
TheGateway = Annotated[Gateway, Depends(gateway_of)]
Caller = Annotated[Principal, Depends(principal_of)]


@router.get("/v1/conversations")
async def page(
    gateway: TheGateway,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    q: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """The caller's conversations, last changed first; `q` searches the titles."""
    found, following = await gateway.conversations.page(caller.tenant, limit, cursor, q)
    return json_response({"data": found, "next": following})


@router.post("/v1/conversations")
async def create(gateway: TheGateway, caller: Caller, body: ConversationRequest | None = None) -> Response:
    """A new conversation; without a title it takes that of its first message."""
    title = body.title if body is not None else ""
    return json_response(await gateway.conversations.create(caller.tenant, title), 201)


@router.get("/v1/conversations/{identifier}")
async def get(identifier: str, gateway: TheGateway, caller: Caller) -> Response:
    """All turns with all their variants."""
    return json_response(_conversation(await gateway.conversations.get(caller.tenant, identifier)))


@router.patch("/v1/conversations/{identifier}")
async def rename(identifier: str, body: RenameRequest, gateway: TheGateway, caller: Caller) -> Response:
    """Another title."""
    await gateway.conversations.rename(caller.tenant, identifier, body.title)
    return json_response({"id": identifier, "title": body.title})


@router.delete("/v1/conversations/{identifier}")
async def delete(identifier: str, gateway: TheGateway, caller: Caller) -> Response:
    """Gone, with everything in it."""
    running = await gateway.conversations.running(caller.tenant, identifier)
    await gateway.conversations.delete(caller.tenant, identifier)
    if running is not None:
        gateway.runs.stop_quietly(caller.tenant, running)
    return json_response({"id": identifier, "deleted": True})


@router.get("/v1/conversations/{identifier}/export")
async def export(
    identifier: str, gateway: TheGateway, caller: Caller, format: Literal["json", "markdown"] = "json"
) -> Response:
    """The conversation as a file."""
    conversation = await gateway.conversations.get(caller.tenant, identifier)
    if format == "markdown":
        body, media, suffix = _markdown(conversation).encode(), "text/markdown", "md"
    else:
        body, media, suffix = (
            orjson.dumps(_conversation(conversation), option=orjson.OPT_INDENT_2),
            "application/json",
            "json",
        )
    headers = {"content-disposition": f'attachment; filename="{conversation.summary.id}.{suffix}"'}
    return Response(body, headers=headers, media_type=media)


def _conversation(conversation: Conversation) -> dict[str, object]:
    summary: Summary = conversation.summary
    return {
        "id": summary.id,
        "title": summary.title,
        "created": summary.created,
        "updated": summary.updated,
        "turns": [_turn(turn) for turn in conversation.turns],
    }


def _turn(turn: Turn) -> dict[str, object]:
    return {
        "id": turn.id,
        "user": turn.user,
        "created": turn.created,
        "variants": turn.variants,
        "chosen": turn.chosen,
    }


def _markdown(conversation: Conversation) -> str:
    blocks = [f"# {conversation.summary.title or conversation.summary.id}"]
    for turn in conversation.turns:
        blocks += ["## User", turn.user]
        if turn.variants:
            variant = turn.variants[turn.chosen]
            task = f" ({variant.task})" if variant.task else ""
            blocks += [f"## Onebox{task}", variant.text or f"*{variant.state}*"]
    return "\n\n".join(blocks) + "\n"
