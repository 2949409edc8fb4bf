"""Stop: how long until the last token and until the engine's slot is free, and whether anything leaks.

64 replies run at once on two scripted replicas behind Ray Serve; each is cancelled at a random place. Then a thousand
replies are left or cancelled at random, and the engines are asked what they still work on.
"""

import asyncio
import os
import random
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

import aiohttp
import orjson

from onebox.client import Client
from onebox.events import Stopped, decode
from onebox.messages import user
from onebox.sockets import free_port
from tests.bench import report
from tests.bench.measures import ms, percentile
from tests.product import KEY, product

STREAMS = 64
ROUNDS = 5
ABORTS = 1000
SETTLE_S = 5.0
TOKEN = "bench-token"
ENV = {
    "ONEBOX_ENGINE": "scripted",
    "ONEBOX_ENGINE_REPLICAS": "2",
    "ONEBOX_INTERNAL_TOKEN": TOKEN,
    "ONEBOX_SCRIPTED_ITL_MS": "20",
}


async def main() -> None:
    """Run it and write the section `stop`."""
    seed = int(os.environ.get("SEED", "7"))
    chance = random.Random(seed)
    port = free_port()
    env = ENV | {"ONEBOX_ENGINE_PORT": str(port)}
    with tempfile.TemporaryDirectory(prefix="ob-") as folder, product(Path(folder), env) as ours:
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"authorization": f"Bearer {KEY}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as http:
            await asyncio.gather(*[_stop(http, ours.api_url, chance, index) for index in range(8)])
            stops: list[tuple[float, Stopped]] = []
            for _ in range(ROUNDS):
                stops += await asyncio.gather(*[_stop(http, ours.api_url, chance, index) for index in range(STREAMS)])
        async with Client(ours.api_url, KEY) as client:
            kinds = await _abort_many(client, chance)
            left = await _left(port)
    last = [seconds for seconds, _ in stops]
    freed = [(receipt.slot_freed_ms or 0.0) / 1000 for _, receipt in stops]
    without = sum(receipt.slot_freed_ms is None for _, receipt in stops)
    rows = [
        ("last token after the stop was sent", ms(percentile(last, 0.5)), ms(percentile(last, 0.99)), "100 ms p99"),
        (
            "engine slot free (engine's own count)",
            ms(percentile(freed, 0.5)),
            ms(percentile(freed, 0.99)),
            "250 ms p99",
        ),
    ]
    text = report.table(("", "p50", "p99", "goal"), rows)
    load = report.load_average()
    note = (
        f"{len(stops)} stops at {STREAMS} streams, seed {seed}; {without} receipts without a slot time. "
        f"{ABORTS} random aborts ({kinds['left']} readers left, {kinds['stopped']} stopped): **{left} requests left in "
        f"the engines** (goal 0). Load average after: {load}."
    )
    report.write_section("stop", "Stopping", f"{note}\n\n{text}")


async def _stop(http: aiohttp.ClientSession, url: str, chance: random.Random, index: int) -> tuple[float, Stopped]:
    """Seconds from sending the stop to the last text, and the receipt. It reads raw lines: 64 streams share a core."""
    ask = {"model": "chat", "input": f"Write on and on, number {index}", "background": True, "max_output_tokens": 4000}
    async with http.post(f"{url}/v1/responses", json=ask) as response:
        run = f"{url}/v1/responses/{(await response.json())['id']}"
    stop_at = time.perf_counter() + chance.uniform(0.5, 1.5)
    cancelling: asyncio.Task[Stopped] | None = None
    sent = last = 0.0

    async def cancel() -> Stopped:
        async with http.post(f"{run}/cancel") as response:
            event = decode(orjson.dumps((await response.json())["onebox"]["event"]))
        if not isinstance(event, Stopped):
            raise RuntimeError(f"{run} ended before it was stopped")
        return event

    async with http.get(f"{run}?stream=true") as response:
        async for line in response.content:
            if line.startswith(b"event: response.output_text.delta"):
                last = time.perf_counter()
                if cancelling is None and last > stop_at:
                    sent = last
                    cancelling = asyncio.create_task(cancel())
    if cancelling is None:
        raise RuntimeError(f"{run} ended before it was stopped")
    return max(0.0, last - sent), await cancelling


async def _abort_many(client: Client, chance: random.Random) -> dict[str, int]:
    kinds = {"left": 0, "stopped": 0}
    waiting = list(range(ABORTS))

    async def user_of_many() -> None:
        while waiting:
            index = waiting.pop()
            if chance.random() < 0.5:
                kinds["left"] += 1
                await _leave(client, chance, index)
            else:
                kinds["stopped"] += 1
                run = await client.start([user(f"Say it, number {index}")], model="chat", max_tokens=4000)
                await asyncio.sleep(chance.uniform(0.0, 0.4))
                await client.cancel(run.run_id)

    await asyncio.gather(*[user_of_many() for _ in range(32)])
    return kinds


async def _leave(client: Client, chance: random.Random, index: int) -> None:
    """Read some of a reply and close the connection."""
    most = chance.randrange(1, 30)
    seen = 0
    async with aclosing(client.stream([user(f"Leave it, number {index}")], model="chat", max_tokens=4000)) as events:
        async for _ in events:
            seen += 1
            if seen == most:
                break


async def _left(port: int) -> int:
    """Requests that the engines still count once that has settled; the most any of them answers."""
    deadline = time.monotonic() + SETTLE_S
    headers = {"authorization": f"Bearer {TOKEN}"}
    while True:
        left = 0
        for _ in range(16):  # each answer is one replica's
            async with aiohttp.request("GET", f"http://127.0.0.1:{port}/metrics", headers=headers) as response:
                lines = (await response.text()).splitlines()
            row = next(line for line in lines if line.startswith("onebox_engine_running "))
            left = max(left, int(float(row.rsplit(" ", 1)[1])))
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)
