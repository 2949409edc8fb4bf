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
    engines, store = await asyncio.gather(gateway.engines.readiness(ENGINE_TIMEOUT_S), _store_state(gateway))
    ready = engines.state == "ready" and store == "ok"
    body: dict[str, object] = {
        "ready": ready,
        "store": store,
        "engine": engines.state,
        "model": engines.model,
        "detail": engines.detail if store == "ok" else "The conversation store does not answer.",
    }
    if engines.models:
        body["models"] = engines.models
    response = json_response(body, 200 if ready else 503)
    if not ready:
        response.headers["retry-after"] = RETRY_AFTER_S
    return response


@router.get("/metrics")
async def metrics(gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """What this worker and its siblings on this machine have counted, for Prometheus."""
    return Response(await asyncio.to_thread(gateway.metrics.render), media_type=CONTENT_TYPE)


@router.get("/metrics/engines")
async def engine_metrics(gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """The metrics of every engine replica, with its address in the label `replica`."""
    return Response(await gateway.engine_metrics.page(), media_type=CONTENT_TYPE)


async def _store_state(gateway: Gateway) -> str:
    try:
        await gateway.store.ping()
    except OneboxError:
        return "down"
    return "ok"
