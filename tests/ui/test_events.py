"""The page's event handlers, without a browser."""

import gradio as gr

from onebox.client import Client
from ui import render
from ui.chat import Chat
from ui.page import Page
from ui.stream import Pace, Seats
from ui.strings import EN


async def test_thumb_that_cannot_be_stored_is_shown_as_a_notice() -> None:
    async with Client("http://127.0.0.1:1", "key") as nobody:
        page = Page(nobody, Chat(nobody, Pace(), Seats()))
        outputs = await page.on_like("c1", "en", {}, gr.LikeData(None, {"index": 1, "value": "Hello", "liked": True}))
    assert outputs == {page.notice: render.notice(render.friendly("unavailable", EN), EN)}
    (wired,) = (event for event in page.blocks.fns.values() if event.name == "on_like")
    assert wired.outputs == [page.notice]
