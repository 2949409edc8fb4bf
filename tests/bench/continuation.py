"""The real model goes on elsewhere: greedy replies whose vLLM replica is killed, against the same ones undisturbed.

Two replicas; one of them is killed while every reply is half written, so about half of the replies lose theirs. Each
question is answered undisturbed twice, before and after, which shows what the model's numerics alone may change.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

import aiohttp

from onebox.client import Client
from onebox.events import Completed, TextDelta
from onebox.messages import user
from tests.bench import report
from tests.bench.measures import engine_replicas, ms, percentile
from tests.bench.real_model import fetch, fresh_home
from tests.product import KEY, product

MODEL = "smollm2-135m"
QUESTIONS = (
    "Write a short story about a lighthouse keeper.",
    "Explain how rain forms.",
    "Describe a market in the morning.",
    "Tell me about the history of bread.",
)
TOKENS = 160
KILLS = 4
ENV = {
    "ONEBOX_MODEL": MODEL,
    "ONEBOX_MODEL_CONTEXT": "2048",
    "ONEBOX_ENGINE_REPLICAS": "2",
    "ONEBOX_CPU_THREADS": "1",
    "ONEBOX_CPU_KV_CACHE_GIB": "0.5",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply, and the longest silence in it after its first text."""

    text: str
    gap_s: float


async def main() -> None:
    """Run it and write the section `continuation`."""
    await fetch(MODEL)
    gaps: list[float] = []
    differences: list[str] = []
    same = moved = noise = 0
    with fresh_home() as home, product(home, ENV) as ours:
        async with Client(ours.api_url, KEY) as client:
            await _two_replicas(ours.pid)
            before = await _all(client)
            for _ in range(KILLS):
                moves = await _moves(ours.api_url)
                disturbed = await _all(client, lambda: _kill(ours.pid))
                moved += await _moves(ours.api_url) - moves
                gaps += [reply.gap_s for reply in disturbed]
                for question, one, two in zip(QUESTIONS, before, disturbed, strict=True):
                    same += one.text == two.text
                    if one.text != two.text:
                        differences.append(_difference(question, one.text, two.text))
                await _two_replicas(ours.pid)
            after = await _all(client)
            noise = sum(one.text != two.text for one, two in zip(before, after, strict=True))
    asked = KILLS * len(QUESTIONS)
    rows = [
        ("replies that had to go on at the other replica", f"{moved} of {asked}"),
        ("replies equal to the undisturbed ones, byte for byte", f"{same} of {asked}"),
        ("undisturbed replies that differ from themselves", f"{noise} of {len(QUESTIONS)}"),
        ("longest silence in a disturbed reply, p50 / most", f"{ms(percentile(gaps, 0.5))} / {ms(max(gaps))}"),
    ]
    load = report.load_average()
    note = (
        f"{MODEL} on vLLM, two replicas of one thread each, {TOKENS} tokens, greedy, {KILLS} kills, load average "
        f"after: {load}."
    )
    told = "".join(f"\n- {difference}" for difference in differences)
    text = f"{note}\n\n{report.table(('', 'measured'), rows)}{chr(10) + told if told else ''}"
    report.write_section("continuation", "A killed vLLM replica", text)


async def _all(client: Client, act: Callable[[], None] | None = None) -> list[Reply]:
    """The replies to all questions at once; `act` is done when each has a third of its text."""
    ready = [asyncio.Event() for _ in QUESTIONS]
    reading = [
        asyncio.create_task(_reply(client, question, event)) for question, event in zip(QUESTIONS, ready, strict=True)
    ]
    if act is not None:
        await asyncio.gather(*(event.wait() for event in ready))
        act()
    return list(await asyncio.gather(*reading))


async def _reply(client: Client, question: str, ready: asyncio.Event) -> Reply:
    run = await client.start([user(question)], model=MODEL, max_tokens=TOKENS, temperature=0)
    pieces: list[str] = []
    gap_s, last = 0.0, 0.0
    async with aclosing(client.follow(run.run_id)) as events:
        async for _, event in events:
            if isinstance(event, TextDelta):
                now = time.perf_counter()
                gap_s, last = max(gap_s, now - last if last else 0.0), now
                pieces.append(event.text)
                if len("".join(pieces)) > TOKENS:
                    ready.set()
            ended = event
    if not isinstance(ended, Completed):
        raise RuntimeError(f"{question!r} ended with {ended}")
    ready.set()
    return Reply("".join(pieces), gap_s)


def _kill(launcher: int) -> None:
    engine_replicas(launcher)[0].kill()


async def _two_replicas(launcher: int) -> None:
    """Return once both replicas have served for a while: a new one first loads its model."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        grown = [process for process in engine_replicas(launcher) if len(process.children(recursive=True)) > 0]
        if len(grown) == 2 and all(time.time() - process.create_time() > 75 for process in grown):
            return
        await asyncio.sleep(1)
    raise RuntimeError("the killed replica did not come back")


async def _moves(url: str) -> int:
    """How often replies went on elsewhere, by the counters of all workers."""
    async with aiohttp.request("GET", f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("onebox_runs_continued_total{")))


def _difference(question: str, one: str, two: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return f"{question!r}: first difference at character {at}: {one[at : at + 30]!r} became {two[at : at + 30]!r}"
