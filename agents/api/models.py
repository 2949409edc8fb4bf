"""`GET /v1/models`: what may stand in a request's `model`."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from agents.api.replies import json_response
from agents.engine import Card
from agents.execution import AUTO
from agents.gateway import Gateway, gateway_of
from onebox.errors import NotFound, OneboxError, UnknownModel
from onebox.fleet_spec import SINGLE, Target

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request's `model` asks for: a task, an engine without a plugin (`raw`), or neither: the router decides.

    `model` is the name of that engine's model or adapter, None for the only one.
    """

    task: str | None = None
    raw: bool = False
    model: str | None = None


@router.get("/v1/models", tags=["models"])
async def models(gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """`auto`, every task, every model and adapter; an only model once it answers."""
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


async def resolve_model(gateway: Gateway, model: str) -> Wanted:
    """What `model` asks for.

    Raises:
        UnknownModel: it is neither 'auto' nor the name of a task, a model or an adapter.
    """
    if model == AUTO:
        return Wanted()
    if model in gateway.executor.plugins:
        return Wanted(task=model)
    names = _names(gateway)
    if model in names:
        return Wanted(raw=True, model=model)
    if SINGLE in gateway.engines.targets:
        only = (await gateway.engines.card(SINGLE)).id
        if model == only:
            return Wanted(raw=True)
        names = [*names, only]
    known = ", ".join(repr(name) for name in (AUTO, *gateway.executor.plugins, *names))
    raise UnknownModel(f"Model {model!r} does not exist here; known: {known}. Choose one of these.", param="model")


def _names(gateway: Gateway) -> list[str]:
    """The models and adapters that have names in the settings."""
    return [name for name in gateway.engines.targets if name != SINGLE]


async def _entries(gateway: Gateway) -> list[dict[str, object]]:
    """Tasks, then models, then their adapters; of several models each task and each model has those it goes to."""
    engines = gateway.engines
    cards = await _cards(gateway)
    several = engines.spec.several
    orders = {task: list(engines.spec.order(task)) for task in gateway.executor.plugins} if several else {}
    entries = [_entry(name, "onebox") for name in (AUTO, *gateway.executor.plugins)]
    for entry in entries:
        if order := orders.get(str(entry["id"])):
            entry["onebox"] = {"models": order}
    for name, target in engines.targets.items():
        card = cards.get(target.model)
        if name == SINGLE and card is None:
            continue
        entry = _entry(name or (card.id if card is not None else ""), "engine")
        if card is not None:
            entry["max_model_len"] = card.context_length
        if target.adapter is not None:
            entry["parent"] = _parent(target, cards)
        if several:
            asked = [task for task, order in orders.items() if name in order]
            entry["onebox"] = {"tasks": asked, "answers": card is not None}
        entries.append(entry)
    return entries


async def _cards(gateway: Gateway) -> Mapping[str, Card]:
    """The cards of the models that answer."""

    async def ask(model: str) -> tuple[str, Card | None]:
        try:
            return model, await gateway.engines.card(model)
        except OneboxError:
            return model, None

    found = await asyncio.gather(*map(ask, gateway.engines.spec.models))
    return {model: card for model, card in found if card is not None}


def _parent(target: Target, cards: Mapping[str, Card]) -> str | None:
    """The name of the model an adapter belongs to."""
    if target.model != SINGLE:
        return target.model
    card = cards.get(SINGLE)
    return card.id if card is not None else None


def _entry(name: str, owner: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}
