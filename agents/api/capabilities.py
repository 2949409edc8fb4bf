"""`GET /v1/capabilities`: what the box can do now, how well and how fast, and what it cannot."""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from agents.api.replies import json_response
from agents.api.route import LeanRoute
from agents.gateway import Gateway, gateway_of

router = APIRouter(route_class=LeanRoute)


@router.get("/v1/capabilities", tags=["models"])
async def show(gateway: Annotated[Gateway, Depends(gateway_of)]) -> Response:
    """The object that the answer to "what can you do?" is made of, too."""
    return json_response((await gateway.executor.capabilities()).to_json())
