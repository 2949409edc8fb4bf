"""Fleets of several real replicas: who tells of whom, where requests go, and how a fleet grows, shrinks and sleeps."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import psutil
import pytest

from agents.engine import EngineClient
from agents.generation import End, Generation
from onebox.messages import Message
from onebox.plugin import Sampling
from onebox.settings import read_settings
from serving.scripted_engine import NATURAL_LENGTH
from tests.processes import Fleet, FleetSpec, run_fleet

PLACES = 4
SCRIPTED = {
    "engine": "scripted",
    "engine_coalesce_ms": "5",
    "engine_max_ongoing": str(PLACES),
    "scripted_itl_ms": "10",
    "scripted_ttft_ms": "5",
}


@pytest.fixture(scope="module", params=["haproxy", pytest.param("proxy", marks=pytest.mark.faults)])
def three(request: pytest.FixtureRequest, test_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three replicas behind each kind of ingress."""
    values = SCRIPTED | {"home": str(test_home), "engine_replicas": "3", "engine_ingress": request.param}
    log = tmp_path_factory.mktemp("three") / "fleet.log"
    with run_fleet(FleetSpec(values), log) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def elastic(test_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One replica of four places, which may become three, or none."""
    values = SCRIPTED | {
        "home": str(test_home),
        "engine_replicas_min": "0",
        "engine_replicas_max": "3",
        "engine_scale_up_s": "0.5",
        "engine_scale_down_s": "1",
        "engine_idle_s": "3",
        "scripted_itl_ms": "60",
    }
    with run_fleet(FleetSpec(values), tmp_path_factory.mktemp("elastic") / "fleet.log") as fleet:
        yield fleet


async def roster(fleet: Fleet, url: str | None = None) -> list[dict[str, object]]:
    """What a replica says of the fleet; nothing where none answers."""
    async with httpx.AsyncClient(headers=fleet.headers, timeout=5, trust_env=False) as http:
        try:
            answer = await http.get(f"{url or fleet.url}/v1/fleet")
        except httpx.HTTPError:
            return []
    return list(answer.json()["replicas"]) if answer.status_code == 200 else []


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30) -> float:
    """The seconds until the condition held."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < timeout_s, "the condition never held"
        await asyncio.sleep(0.1)
    return time.monotonic() - began


def client_of(fleet: Fleet, reasons: list[str] | None = None, **values: object) -> EngineClient:
    settings = read_settings(engine_url=fleet.url, internal_token=fleet.token, **values)
    return EngineClient(settings, None if reasons is None else reasons.append)


def call_of(number: int, tokens: int, affinity: str | None = None) -> Generation:
    messages = [Message("user", f"Tell me about river number {number}.")]
    return Generation(f"call-{number}-{time.monotonic_ns()}", messages, Sampling(), tokens, affinity=affinity)


async def read(client: EngineClient, call: Generation) -> int:
    """The tokens of the whole reply."""
    async with aclosing(client.generate(call)) as items:
        async for item in items:
            if isinstance(item, End):
                return item.completion_tokens
    raise AssertionError("a reply ends with its End")


async def knows(client: EngineClient, replicas: int) -> None:
    """Returns once the client sends requests straight to that many replicas."""

    async def served() -> bool:
        await read(client, call_of(0, 1))
        return client.places() == replicas * PLACES

    await eventually(served)


async def test_each_replica_tells_of_all_and_of_their_load(three: Fleet) -> None:
    async def agreed() -> bool:
        doors = {str(record["door"]) for record in await roster(three)}
        told = [{record["door"] for record in await roster(three, door)} for door in doors]
        return len(doors) == 3 and all(one == doors for one in told)

    await eventually(agreed)
    async with client_of(three) as client:
        await knows(client, 3)
        await asyncio.sleep(1.5)  # until then its view may still count the reply that has just ended
        reading = [asyncio.create_task(read(client, call_of(number, 600))) for number in range(9)]

        async def all_run() -> bool:
            records = await roster(three)
            return [record["running"] for record in records] == [3, 3, 3] and all(one["tokens"] for one in records)

        await eventually(all_run)
        assert min(await asyncio.gather(*reading)) >= NATURAL_LENGTH[0]


async def test_requests_of_one_key_go_to_one_replica_whichever_gateway_sends_them(three: Fleet) -> None:
    async with client_of(three) as one, client_of(three) as other:
        await knows(one, 3)
        await knows(other, 3)
        for number in range(12):
            await read(one, call_of(number, 2, affinity=f"conversation-{number}"))
        before = Counter(await _served(three))
        await asyncio.sleep(1.5)  # the other gateway hears of it
        for number in range(12):
            for _ in range(2):
                await read(other, call_of(number, 2, affinity=f"conversation-{number}"))
        after = Counter(await _served(three))
        homes = {door: count for door, count in (after - before).items() if count}
        assert sum(homes.values()) == 24
        assert all(count % 2 == 0 for count in homes.values())
        assert len(homes) > 1


async def test_fleet_grows_under_load_and_shrinks_and_sleeps_without_cutting_a_reply(elastic: Fleet) -> None:
    reasons: list[str] = []
    async with client_of(elastic, reasons, engine_replicas_min=0) as client:
        await knows(client, 1)
        more = shrinking = True

        async def flood(number: int) -> None:
            while more:
                assert await read(client, call_of(number, 25)) == 25

        async def trickle(number: int) -> int:
            whole = 0
            while shrinking:
                assert await read(client, call_of(number, 250)) == 250
                whole += 1
            return whole

        flooding = [asyncio.create_task(flood(number)) for number in range(16)]
        await eventually(lambda: _numbers(client, 3))
        slow = [asyncio.create_task(trickle(number)) for number in range(20, 22)]
        more = False
        await asyncio.gather(*flooding)
        await eventually(lambda: _numbers(client, 1))
        shrinking = False
        assert min(await asyncio.gather(*slow)) >= 1
        await eventually(lambda: _sleeps(client))
        assert (await client.readiness(5.0))[0] == "ready"
        await asyncio.sleep(2)
        assert await _sleeps(client)  # neither probes nor the roster wake it
        assert await read(client, call_of(20, 30)) == 30
    assert reasons == []


async def test_fleet_grows_by_those_who_wait_at_gateways_for_a_place(elastic: Fleet) -> None:
    waiting, busy = 8, True

    async def one_after_the_other() -> None:
        while busy:
            await read(client, call_of(1, 50))

    async with client_of(elastic) as client:
        client.announce(lambda: waiting)
        reading = asyncio.create_task(one_after_the_other())
        await eventually(lambda: _numbers(client, 3))
        waiting = 0
        await eventually(lambda: _numbers(client, 1))
        busy = False
        await reading


async def _numbers(client: EngineClient, replicas: int) -> bool:
    return client.places() == replicas * PLACES


async def _sleeps(client: EngineClient) -> bool:
    return await client.readiness(5.0) == ("ready", "asleep")


async def test_replica_that_is_killed_is_missing_from_the_roster_at_once(three: Fleet) -> None:
    before = {str(record["door"]) for record in await roster(three)}
    victim = next(
        child
        for child in psutil.Process(three.pid).children(recursive=True)
        if "ServeReplica" in " ".join(child.cmdline())
    )
    async with client_of(three) as client:
        await knows(client, 3)
        reading = [asyncio.create_task(read(client, call_of(number, 200))) for number in range(9)]
        await asyncio.sleep(0.5)
        victim.kill()
        assert await asyncio.gather(*reading) == [200] * 9

        async def replaced() -> bool:
            return len({str(record["door"]) for record in await roster(three)} - before) == 1

        await eventually(replaced)


async def _served(fleet: Fleet) -> dict[str, int]:
    """Whole replies of each replica so far."""
    counts: dict[str, int] = {}
    async with httpx.AsyncClient(headers=fleet.headers, timeout=5, trust_env=False) as http:
        for record in await roster(fleet):
            page = (await http.get(f"{record['door']}/metrics")).text
            lines = [line for line in page.splitlines() if line.startswith("onebox_engine_finished_total{")]
            counts[str(record["door"])] = sum(int(float(line.rsplit(" ", 1)[1])) for line in lines)
    return counts
