"""How tokens are put into frames: at once where few read, more of them in one where many do."""

import asyncio
from contextlib import ExitStack

import httpx
import orjson
import pytest

from onebox.settings import Settings
from serving.scripted_engine import ScriptedEngine
from serving.server import ReplicaApp
from serving.work import Work

TOKEN = "frames"


async def tokens_a_frame(replies: int, **settings: object) -> float:
    """How many tokens a frame has, the first one left out, while so many replies are read."""
    values = {"engine": "scripted", "scripted_ttft_ms": 1, "scripted_itl_ms": 20, "internal_token": TOKEN}
    known = Settings.model_validate(values | settings)
    transport = httpx.ASGITransport(ReplicaApp(ScriptedEngine(known), known))
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://replica", headers=headers) as client:

        async def read(number: int) -> list[int]:
            body = {
                "request_id": f"r{number}",
                "messages": [{"role": "user", "content": f"Story {number}"}],
                "sampling": {"max_tokens": 60},
            }
            answer = await client.post("/v1/generate", json=body)
            lines = [orjson.loads(line) for line in answer.text.splitlines()]
            return [len(line["ids"]) for line in lines if "ids" in line][1:]

        frames = [size for reply in await asyncio.gather(*map(read, range(replies))) for size in reply]
    return sum(frames) / len(frames)


async def test_frames_are_merged_for_as_long_as_the_settings_say() -> None:
    assert await tokens_a_frame(1, engine_coalesce_ms=0) < 2
    assert 2 < await tokens_a_frame(1, engine_coalesce_ms=80) < 6


async def test_many_replies_are_merged_for_longer() -> None:
    many = {"engine_coalesce_ms": 20, "engine_frames_per_s": 50, "engine_max_ongoing": 64}
    assert await tokens_a_frame(1, **many) < 3
    assert await tokens_a_frame(16, **many) > 4


@pytest.mark.parametrize(("replies", "tick_ms"), [(0, 15), (2, 15), (8, 45), (18, 90), (64, 90)])
def test_the_more_read_the_longer_is_a_tick_up_to_a_bound(replies: int, tick_ms: float) -> None:
    work = Work(Settings(engine_coalesce_ms=15, engine_frames_per_s=200, engine_max_ongoing=64))
    with ExitStack() as open_:
        for _ in range(replies):
            open_.enter_context(work.reply())
        assert work.tick_s() * 1000 == pytest.approx(tick_ms)
