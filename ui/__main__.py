"""`python -m ui [--fd N]`: the page as a process. It starts and serves whether or not the API answers."""

import argparse
import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from typing import Literal

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from gradio.themes import Base

from onebox import logs
from onebox.client import Client
from onebox.errors import OneboxError, SetupError
from onebox.settings import Settings, read_settings
from onebox.sockets import check_bind, listen
from ui.chat import Chat
from ui.page import ASSETS, Page
from ui.stream import Pace, Seats

MAX_STREAMS = 512


def build_app(settings: Settings, pace: Pace) -> FastAPI:
    """The page's ASGI app, whose streams update at `pace`."""
    key = settings.ui_key or settings.admin_key
    client = Client(settings.gateway_url, key.get_secret_value() if key else "", connect_timeout_s=2.0)
    blocks = Page(client, Chat(client, pace, Seats())).blocks
    blocks.max_threads = MAX_STREAMS
    blocks.queue(status_update_rate=5, api_open=False, max_size=MAX_STREAMS, default_concurrency_limit=None)
    _quieten(blocks)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(title="Onebox page", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.get("/healthz")
    async def healthz() -> dict[str, bool]:
        return {"ok": True}

    @app.get("/export/{conversation}")
    async def export(conversation: str, format: Literal["json", "markdown"] = "markdown") -> Response:
        content = await client.export_conversation(conversation, format)
        suffix, media = ("md", "text/markdown; charset=utf-8") if format == "markdown" else ("json", "application/json")
        name = "".join(c for c in conversation if c.isalnum() or c in "-_")
        headers = {"Content-Disposition": f'attachment; filename="onebox-{name}.{suffix}"'}
        return Response(content, media_type=media, headers=headers)

    @app.exception_handler(OneboxError)
    async def refused(request: Request, error: OneboxError) -> JSONResponse:
        return JSONResponse({"error": {"code": error.code, "message": error.message}}, error.status)

    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=Base(font=[], font_mono=[]),
        css_paths=ASSETS / "page.css",
        head=f"<script>{(ASSETS / 'page.js').read_text(encoding='utf-8')}</script>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
    )
    return app


def _quieten(blocks: gr.Blocks) -> None:
    """Gradio's queue polls each millisecond and keeps a pandas table of all events; neither is wanted here."""
    queue = blocks._queue
    queue.sleep_when_free = 0.004
    queue.ANALYTICS_MAX_EVENTS = 1


def main() -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m ui", description="The Onebox page.")
    parser.add_argument("--fd", type=int, help="an inherited listening socket")
    options = parser.parse_args()
    try:
        settings = read_settings()
        listener = socket.socket(fileno=options.fd) if options.fd is not None else _listen(settings)
    except SetupError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    logs.set_up(settings, "page")
    config = uvicorn.Config(
        build_app(settings, Pace()),
        log_level=settings.log_level,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    asyncio.run(server.serve([listener]))
    return 0 if server.started else 1


def _listen(settings: Settings) -> socket.socket:
    check_bind(settings)
    return listen(settings.host, settings.ui_port, "ONEBOX_UI_PORT")


if __name__ == "__main__":
    sys.exit(main())
