"""`POST /v1/feedback`: a like or dislike of one variant."""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from agents.api.replies import json_response
from agents.api.route import LeanRoute
from agents.api.schemas import FeedbackRequest
from agents.gateway import Gateway, gateway_of, principal_of
from agents.keys import Principal

router = APIRouter(route_class=LeanRoute)


@router.post("/v1/feedback", tags=["conversations"])
async def rate(
    body: FeedbackRequest,
    gateway: Annotated[Gateway, Depends(gateway_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """Keep it, or take it back with null."""
    await gateway.conversations.rate(principal.tenant, body.conversation, body.run_id, body.value)
    gateway.corrections.rated(principal.tenant, body.conversation, body.run_id, body.value)
    return json_response({"conversation": body.conversation, "run_id": body.run_id, "value": body.value})
