"""The gateway's ASGI app: routes, admission, and one shape for every error. Started by `agents.__main__`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from agents.api import capabilities, chat, conversations, feedback, health, labels, models, responses, tasks
from agents.api.replies import error_response
from agents.gateway import open_gateway
from agents.middleware import Entrance
from agents.observed import Observed
from agents.router import Router
from agents.shared_metrics import Place
from agents.tracing import open_tracer
from onebox import __version__
from onebox.errors import BadRequest, NotFound, OneboxError
from onebox.settings import Settings
from plugins.registry import load_plugins


def create_app(settings: Settings, place: Place | None = None) -> FastAPI:
    """The app of one worker, which counts at its `place` if it has siblings; its parts are opened when it serves.

    Raises:
        SetupError: a plugin cannot be loaded, or the packages for tracing are missing.
    """
    plugins = load_plugins(settings.plugins)
    router = Router.load(plugins, settings)
    tracer = open_tracer(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async with open_gateway(settings, plugins, router, tracer, place) as gateway:
            app.state.gateway = gateway
            yield

    app = FastAPI(title="Onebox", version=__version__, lifespan=lifespan, redoc_url=None, strict_content_type=False)
    for module in (chat, responses, tasks, models, capabilities, conversations, feedback, labels, health):
        app.include_router(module.router)
    app.add_middleware(Entrance)
    app.add_middleware(Observed)
    app.add_exception_handler(OneboxError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OneboxError)
    return _answer(request, error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # Pydantic names the members of a union by their validators, which no caller knows.
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path") and "[" not in str(part)]
    if first["type"] == "json_invalid":
        return _answer(request, BadRequest("The body is not valid JSON in UTF-8. Correct it."))
    name = ".".join(place)
    what = f"{name!r} is not usable" if name else "The request is not usable"
    return _answer(
        request,
        BadRequest(f"{what}: {first['msg'].removeprefix('Value error, ')}. See /docs for the API.", param=name or None),
    )


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        return _answer(request, NotFound(f"There is nothing at {path!r}. See /docs for the API."))
    response = _answer(request, BadRequest(f"{request.method} {path!r} cannot be done: {error.detail}. See /docs."))
    response.status_code = error.status_code
    return response


def _answer(request: Request, error: OneboxError) -> Response:
    request.app.state.gateway.metrics.count_error(error.code)
    return error_response(error)
