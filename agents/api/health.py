"""`/healthz`, `/readyz` and `/metrics`: open to probes, so they tell no secrets."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from agents.api.replies import json_response
from agents.gateway import Gateway, gateway_of
from agents.metrics import CONTENT_TYPE
from onebox.errors import OneboxError

ENGINE_TIMEOUT_S = 3.0
RETRY_AFTER_S = "2"

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Response:
    """The process lives."""
    return json_response({"ok": True})


@router.get("/readyz")
async def readyz(gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """Whether a message sent now would be answered."""
    (engine, detail), store = await asyncio.gather(gateway.engine.readiness(ENGINE_TIMEOUT_S), _store_state(gateway))
    model: str | None = None
    if engine == "ready":
        try:
            model = (await gateway.engine.card()).id
        except OneboxError as error:
            engine, detail = "down", error.message
    ready = engine == "ready" and store == "ok"
    if store == "down":
        detail = "The conversation store does not answer."
    response = json_response(
        {"ready": ready, "store": store, "engine": engine, "model": model, "detail": detail}, 200 if ready else 503
    )
    if not ready:
        response.headers["retry-after"] = RETRY_AFTER_S
    return response


@router.get("/metrics")
async def metrics(gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """This worker's counters for Prometheus."""
    return Response(gateway.metrics.render(), media_type=CONTENT_TYPE)


async def _store_state(gateway: Gateway) -> str:
    try:
        await gateway.store.ping()
    except OneboxError:
        return "down"
    return "ok"
