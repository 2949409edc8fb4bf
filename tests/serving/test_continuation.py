"""Replies that lose their connection again and again, in every way an engine is served."""

import asyncio
from contextlib import aclosing

import httpx
import pytest

from agents.engine import EngineClient
from agents.generation import End, Frame, Generation
from onebox.messages import Message
from onebox.plugin import Sampling
from onebox.settings import read_settings
from tests.agents.ingress import ingress_of
from tests.serving.wire import Wire

CUTS = (1, 9, 20)
TOKENS = 32


@pytest.mark.parametrize("content", ["Tell me about rivers.", "请把这句话重复一遍：你好，世界！今天天气很好。"])
async def test_reply_that_is_cut_again_and_again_is_the_undisturbed_one(wire: Wire, content: str) -> None:
    reasons: list[str] = []
    async with ingress_of(httpx.URL(wire.url).port or 80) as ingress:
        settings = read_settings(engine_url=ingress.url, internal_token=wire.token, engine_doors=False)
        async with EngineClient(settings, reasons.append) as client:
            call = Generation("undisturbed", [Message("user", content)], Sampling(temperature=0.0), TOKENS)
            frames, end = await read(client, call)
            cut_at, ids, text = list(CUTS), list[int](), ""
            async with aclosing(client.generate(call)) as items:
                async for item in items:
                    if isinstance(item, End):
                        assert item == end
                        break
                    ids += item.ids
                    text += item.text
                    if cut_at and len(ids) >= cut_at[0]:
                        del cut_at[0]
                        ingress.cut()
                        await asyncio.sleep(0)
    assert reasons == ["cut"] * len(CUTS)
    assert tuple(ids) == tuple(i for frame in frames for i in frame.ids)
    assert text == "".join(frame.text for frame in frames)


async def test_abort_frees_the_place_behind_any_ingress(wire: Wire) -> None:
    async with EngineClient(read_settings(engine_url=wire.url, internal_token=wire.token)) as client:
        call = Generation("long", [Message("user", "Tell me about rivers.")], Sampling(temperature=0.0), 1500)
        async with aclosing(client.generate(call)) as items:
            first = await anext(items)
            receipt = await client.abort("long")
            assert await wire.running() == 0
    assert isinstance(first, Frame)
    assert receipt.freed_ms is not None
    assert receipt.tokens is not None
    assert receipt.tokens >= first.count


async def read(client: EngineClient, call: Generation) -> tuple[list[Frame], End]:
    """The whole reply."""
    frames: list[Frame] = []
    async with aclosing(client.generate(call)) as items:
        async for item in items:
            if isinstance(item, End):
                return frames, item
            frames.append(item)
    raise AssertionError("a reply ends with its End")
