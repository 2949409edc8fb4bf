"""`GET /v1/models`: what may stand in a request's `model`."""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from agents.api.replies import json_response
from agents.execution import AUTO
from agents.gateway import Gateway, gateway_of
from onebox.errors import NotFound, OneboxError, UnknownModel

router = APIRouter()


@router.get("/v1/models", tags=["models"])
async def models(gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """`auto`, every task, and the engine's model once it answers."""
    return json_response({"object": "list", "data": await _entries(gateway)})


@router.get("/v1/models/{name:path}", tags=["models"])
async def model(name: str, gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """One of them."""
    entries = await _entries(gateway)
    for entry in entries:
        if entry["id"] == name:
            return json_response(entry)
    known = ", ".join(repr(entry["id"]) for entry in entries)
    raise NotFound(f"Model {name!r} does not exist here; known: {known}. Choose one of these.", param="model")


async def resolve_model(gateway: Gateway, model: str) -> tuple[str | None, bool]:
    """The pinned task, if any, and whether the engine is asked without a plugin.

    Raises:
        UnknownModel: `model` is neither 'auto', a task nor the engine's model.
    """
    if model == AUTO:
        return None, False
    if model in gateway.executor.plugins:
        return model, False
    card = await gateway.engine.card()
    if model == card.id:
        return None, True
    known = ", ".join(repr(name) for name in (AUTO, *gateway.executor.plugins, card.id))
    raise UnknownModel(f"Model {model!r} does not exist here; known: {known}. Choose one of these.", param="model")


async def _entries(gateway: Gateway) -> list[dict[str, object]]:
    entries = [_entry(name, "onebox") for name in (AUTO, *gateway.executor.plugins)]
    try:
        card = await gateway.engine.card()
    except OneboxError:
        return entries
    return [*entries, _entry(card.id, "engine") | {"max_model_len": card.context_length}]


def _entry(name: str, owner: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}
