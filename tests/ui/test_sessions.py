"""What the page's process keeps of visitors who have left."""

import asyncio
from typing import Any

import gradio as gr
import httpx
import uvicorn
from fastapi.routing import Mount

from onebox.settings import Settings
from onebox.sockets import listen
from ui.__main__ import build_app
from ui.stream import Pace

VISITORS = 20


async def test_nothing_is_kept_of_a_session_whose_browser_has_left() -> None:
    app = build_app(Settings(), Pace())
    page = next(route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, gr.routes.App))
    with listen("127.0.0.1", 0, "ONEBOX_UI_PORT") as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        serving = asyncio.create_task(server.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as http:
            await asyncio.gather(*(_visit(http, page, f"visitor-{number}") for number in range(VISITORS)))
        async with asyncio.timeout(20):
            while page.state_holder.session_data:
                await asyncio.sleep(0.05)
        server.should_exit = True
        await serving


async def _visit(http: httpx.AsyncClient, page: Any, session: str) -> None:
    """Open the page and close it again, as a browser's tab does."""
    async with http.stream("GET", f"/gradio_api/heartbeat/{session}") as heartbeat:
        await anext(heartbeat.aiter_bytes())
        assert page.state_holder[session] is page.state_holder.session_data[session]  # as any event of it does
