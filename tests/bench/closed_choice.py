"""Whether asking the engine helps where the head is unsure: the golden messages, decided with and without it."""

import asyncio
import time

import httpx

from agents.labelled import GOLDEN, Labelled, read_labelled
from agents.reader.reader import shared_reader
from agents.scoring import Judged, judged
from tests.bench import report
from tests.bench.decoding import MODEL
from tests.bench.real_model import fetch, fresh_home
from tests.product import KEY, product

AT_ONCE = 4


async def main() -> None:
    """Run it and write the section `closed-choice`."""
    await fetch(MODEL)
    items = read_labelled([GOLDEN])
    readings = [shared_reader().read(item.messages) for item in items]
    alone = judged(items, readings)
    with fresh_home() as home:
        env = {"ONEBOX_MODEL": MODEL, "ONEBOX_ROUTER_ENGINE": "true"}
        with product(home, env) as ours:
            began = time.perf_counter()
            routes = await _routes(ours.api_url, items)
            seconds = time.perf_counter() - began
    asked = [route["tier"] == "engine" for route in routes]
    both = Judged([item.task for item in items], [route["task"] for route in routes], [0.0] * len(items))
    rows = [
        (name, f"{judged.accuracy():.1%}", f"{judged.accuracy(asked):.1%}")
        for name, judged in (("the head alone", alone), ("the head, and the engine where it is unsure", both))
    ]
    note = (
        f"{len(items)} golden messages, {MODEL}; the engine was asked about {sum(asked)}, {AT_ONCE} at a time, which "
        f"took {seconds / max(sum(asked), 1):.1f} s each. Load average after: {report.load_average()}."
    )
    text = report.table(("who decides", "all messages", "those the engine was asked about"), rows)
    report.write_section("closed-choice", "The engine asked which task it is", f"{note}\n\n{text}")


async def _routes(url: str, items: list[Labelled]) -> list[dict[str, str]]:
    limit = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as client:

        async def route(item: Labelled) -> dict[str, str]:
            messages = [{"role": one.role, "content": one.text} for one in item.messages]
            async with limit:
                reply = await client.post("/v1/route", json={"messages": messages})
            reply.raise_for_status()
            found: dict[str, str] = reply.json()
            return found

        return list(await asyncio.gather(*(route(item) for item in items)))
