"""The gateway's engine client against real replicas that are killed, stopped, stuck or failing under its replies."""

import asyncio
import os
import random
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from agents.engine import EngineClient, Receipt
from agents.generation import End, Frame, Generation
from onebox.errors import EngineFailed, Overloaded
from onebox.messages import Message
from onebox.plugin import Sampling
from onebox.settings import read_settings
from onebox.sockets import free_port
from tests.agents.ingress import Ingress, ingress_of
from tests.agents.processes import Child

TOKEN = secrets.token_hex(8)
TOKENS = 200
PLACES, QUEUED = 4, 2
SERVED = 'onebox_engine_finished_total{finish="length"}'


@dataclass(slots=True)
class Replica:
    """A scripted replica as a process."""

    child: Child
    port: int

    @property
    def url(self) -> str:
        """Its door."""
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: signal.Signals) -> None:
        """Send it one."""
        assert self.child.process is not None
        self.child.process.send_signal(number)

    def metric(self, name: str) -> int:
        """One of its gauges or counters."""
        lines = httpx.get(f"{self.url}/metrics", headers=HEADERS, trust_env=False).text.splitlines()
        return int(float(next((line.split()[1] for line in lines if line.startswith(f"{name} ")), 0)))


HEADERS = {"authorization": f"Bearer {TOKEN}"}
Start = Callable[..., Replica]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a replica: (*fault arguments, port, **settings) -> Replica."""
    with ExitStack() as ends:

        def replica(*faults: str, port: int | None = None, **values: str) -> Replica:
            return ends.enter_context(_replica(tmp_path, port or free_port(), faults, values))

        yield replica


async def meet(client: EngineClient, ingress: Ingress, other: Replica, back: Replica) -> None:
    """The client hears of the other replica's door; after that the ingress leads back."""
    await ingress.lead_to(other.port)
    assert (await client.readiness(5.0))[0] == "ready"
    await ingress.lead_to(back.port)
    assert (await client.readiness(5.0))[0] == "ready"


@contextmanager
def _replica(folder: Path, port: int, faults: tuple[str, ...], values: dict[str, str]) -> Iterator[Replica]:
    own = {"home": str(folder), "internal_token": TOKEN, "engine_port": str(port)} | values
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ONEBOX_")}
    url = f"http://127.0.0.1:{port}"
    child = Child(
        (sys.executable, "-m", "tests.agents.scripted_replica", *faults),
        inherited | {f"ONEBOX_{name.upper()}": value for name, value in own.items()},
        folder / f"replica-{port}.log",
        lambda: httpx.get(f"{url}/readyz", headers=HEADERS, trust_env=False).status_code == 200,
    )
    try:
        child.start()
        yield Replica(child, port)
    finally:
        child.kill()


def client_of(fleet: Replica | Ingress, reasons: list[str] | None = None, **values: float) -> EngineClient:
    """A client of the fleet; why its replies went on elsewhere is noted in `reasons`."""
    settings = read_settings(engine_url=fleet.url, internal_token=TOKEN, **values)
    return EngineClient(settings, None if reasons is None else reasons.append)


def call_of(tokens: int = TOKENS, **fields: object) -> Generation:
    """A greedy call whose reply has `tokens` tokens."""
    given: dict[str, object] = {
        "request_id": f"resp_{secrets.token_hex(4)}-1",
        "messages": [Message("user", "Tell me about rivers.")],
        "sampling": Sampling(temperature=0.0),
        "max_tokens": tokens,
    }
    return Generation(**(given | fields))  # type: ignore[arg-type]  # fields of a test's choice


async def read(
    client: EngineClient, call: Generation, at: int | None = None, act: Callable[[], object] = lambda: None
) -> tuple[str, list[int], End]:
    """The whole reply; once it has `at` tokens, `act` is done to the fleet."""
    text, ids, acted = "", list[int](), at is None
    async with aclosing(client.generate(call)) as items:
        async for item in items:
            if isinstance(item, End):
                return text, ids, item
            text += item.text
            ids.extend(item.ids)
            if at is not None and not acted and len(ids) >= at:
                acted = True
                act()
    raise AssertionError("a reply ends with its End")


async def test_reply_goes_on_byte_for_byte_when_its_replica_is_killed(start: Start) -> None:
    replica = start()
    reasons: list[str] = []
    async with client_of(replica, reasons) as client:
        whole = await read(client, call_of())
        again = await read(client, call_of(), at=60, act=lambda: (replica.child.kill(), replica.child.start()))
    assert again == whole
    assert len(whole[1]) == whole[2].completion_tokens == TOKENS
    assert reasons == ["cut"]


async def test_reply_goes_on_at_another_replica_when_its_own_is_killed(start: Start) -> None:
    first, second = start(), start()
    reasons: list[str] = []
    async with ingress_of(first.port) as ingress, client_of(ingress, reasons) as client:
        whole = await read(client, call_of())
        await meet(client, ingress, second, first)
        again = await read(client, call_of(), at=60, act=first.child.kill)
    assert again == whole
    assert reasons == ["cut"]
    assert second.metric("onebox_engine_tokens_total") < TOKENS


async def test_reply_goes_on_elsewhere_when_its_replica_is_frozen(start: Start) -> None:
    frozen, other = start(), start()
    reasons: list[str] = []
    async with ingress_of(frozen.port) as ingress, client_of(ingress, reasons, engine_probe_timeout_s=0.5) as client:
        whole = await read(client, call_of())
        await meet(client, ingress, other, frozen)
        again = await read(client, call_of(), at=60, act=lambda: frozen.signal(signal.SIGSTOP))
    assert again == whole
    assert reasons == ["silent"]


async def test_reply_begins_elsewhere_when_the_replica_that_was_asked_is_frozen(start: Start) -> None:
    frozen, other = start(), start()
    reasons: list[str] = []
    async with ingress_of(frozen.port) as ingress, client_of(ingress, reasons, engine_probe_timeout_s=0.5) as client:
        whole = await read(client, call_of())
        await meet(client, ingress, other, frozen)
        frozen.signal(signal.SIGSTOP)
        again = await asyncio.wait_for(read(client, call_of()), 15)
        frozen.signal(signal.SIGCONT)
    assert again == whole
    assert reasons == ["silent"]


async def test_frozen_replica_without_another_is_waited_for(start: Start) -> None:
    replica = start()
    reasons: list[str] = []
    async with client_of(replica, reasons, engine_probe_after_s=0.05, engine_probe_timeout_s=0.1) as client:
        whole = await read(client, call_of())

        def freeze() -> None:
            replica.signal(signal.SIGSTOP)
            asyncio.get_running_loop().call_later(1.0, replica.signal, signal.SIGCONT)

        again = await read(client, call_of(), at=60, act=freeze)
    assert again == whole
    assert reasons == []


async def test_reply_goes_on_elsewhere_when_its_engine_hangs(start: Start) -> None:
    stuck, other = start("--hang-at-token", "60"), start()
    reasons: list[str] = []
    async with client_of(other) as client:
        whole = await read(client, call_of())
    async with ingress_of(other.port) as ingress, client_of(ingress, reasons, stall_timeout_s=0.7) as client:
        await meet(client, ingress, other, stuck)
        assert await read(client, call_of()) == whole
    assert reasons == ["stalled"]


async def test_reply_goes_on_elsewhere_when_its_engine_fails_at_a_token(start: Start) -> None:
    failing, other = start("--fail-at-token", "60"), start()
    reasons: list[str] = []
    async with client_of(other) as client:
        whole = await read(client, call_of())
    async with ingress_of(other.port) as ingress, client_of(ingress, reasons) as client:
        await meet(client, ingress, other, failing)
        assert await read(client, call_of()) == whole
    assert reasons == ["cut"]


async def test_reply_that_fails_everywhere_ends_with_the_engines_error(start: Start) -> None:
    failing = start("--fail-at-token", "60")
    reasons: list[str] = []
    async with client_of(failing, reasons, engine_continuations=2) as client:
        with pytest.raises(EngineFailed, match="at token 60"):
            await read(client, call_of())
    assert reasons == ["cut", "refused"]


async def test_reply_whose_engine_stays_away_ends_with_what_broke_it(start: Start) -> None:
    replica = start()
    async with client_of(replica, engine_patience_s=0.5) as client:
        with pytest.raises(EngineFailed, match="broke off the reply"):
            await read(client, call_of(), at=60, act=replica.child.kill)


async def test_reply_waits_for_room_when_it_has_begun_and_is_refused_at_once_when_not(start: Start) -> None:
    replica = start(engine_max_ongoing="1", engine_max_queued="0", scripted_itl_ms="1")
    async with client_of(replica) as client:
        whole = await read(client, call_of())
        await eventually(lambda: replica.metric("onebox_engine_running") == 0)
        async with aclosing(client.generate(call_of(5000, sampling=Sampling(seed=1)))) as blocking:
            await anext(blocking)
            with pytest.raises(Overloaded):
                await read(client, call_of())
            waiting = asyncio.create_task(read(client, call_of(resume=whole[1][:60])))
            await eventually(lambda: replica.metric('onebox_engine_failed_total{code="overloaded"}') > 1)
        text, ids, end = await waiting
    assert whole[1] == whole[1][:60] + ids
    assert whole[0].endswith(text)
    assert end == whole[2]


@pytest.mark.parametrize("cut", [1, 60, TOKENS - 1, TOKENS])
async def test_resumed_call_counts_all_of_the_reply(start: Start, cut: int) -> None:
    replica = start()
    async with client_of(replica) as client:
        text, ids, end = await read(client, call_of())
        rest = await read(client, call_of(resume=ids[:cut]))
    assert rest[1] == ids[cut:]
    assert text.endswith(rest[0])
    assert rest[2] == end


async def test_choice_that_was_cut_goes_on(start: Start) -> None:
    options = ["alpha beta gamma delta epsilon", "one two three four five six"]
    failing, other = start("--fail-at-token", "2"), start()
    reasons: list[str] = []
    async with ingress_of(other.port) as ingress, client_of(ingress, reasons) as client:
        await meet(client, ingress, other, failing)
        text, _, end = await read(client, call_of(32, choice=options))
    assert text in options
    assert reasons == ["cut"]
    assert end.finish == "stop"


async def test_doors_are_the_way_in_while_the_ingress_is_away(start: Start) -> None:
    replica = start()
    async with ingress_of(replica.port) as ingress, client_of(ingress) as client:
        whole = await read(client, call_of())
        await ingress.close()
        assert await read(client, call_of()) == whole
        assert (await client.readiness(2.0))[0] == "ready"
        await ingress.open()
        before = ingress.connections
        assert await read(client, call_of()) == whole
        assert ingress.connections > before


async def test_reply_goes_on_when_the_ingress_dies(start: Start) -> None:
    replica = start()
    reasons: list[str] = []
    async with ingress_of(replica.port) as ingress, client_of(ingress, reasons) as client:
        whole = await read(client, call_of())
        closing: list[asyncio.Task[None]] = []
        again = await read(client, call_of(), at=60, act=lambda: closing.append(asyncio.create_task(ingress.close())))
    assert again == whole
    assert reasons == ["cut"]


async def test_aborted_call_has_a_receipt_from_the_engine_and_its_reader_meets_an_error(start: Start) -> None:
    replica = start()
    async with client_of(replica) as client:
        call = call_of(5000)
        async with aclosing(client.generate(call)) as items:
            first = await anext(items)
            receipt = await client.abort_prefix(call.request_id.removesuffix("1"))
            assert replica.metric("onebox_engine_running") == 0
            with pytest.raises(EngineFailed, match="stopped"):
                await anext(items)
        assert isinstance(first, Frame)
        assert receipt.tokens is not None
        assert receipt.tokens >= first.count
        assert receipt.freed_ms is not None
        assert await client.abort(call.request_id) == Receipt(None, None)


async def test_call_that_waits_for_its_first_token_can_be_aborted(start: Start) -> None:
    replica = start(engine_max_ongoing="1")
    async with client_of(replica) as client, aclosing(client.generate(call_of(5000))) as blocking:
        await anext(blocking)
        call = call_of()
        reading = asyncio.create_task(read(client, call))
        await eventually(lambda: replica.metric("onebox_engine_waiting") == 1)
        receipt = await client.abort(call.request_id)
        assert replica.metric("onebox_engine_waiting") == 0
        with pytest.raises(EngineFailed, match="stopped"):
            await reading
    assert receipt.tokens == 0
    assert receipt.freed_ms is not None


async def test_call_that_waits_for_an_engine_can_be_aborted(start: Start) -> None:
    replica = start()
    async with client_of(replica) as client:
        call = call_of(resume=(1, 2, 3))
        replica.child.kill()
        reading = asyncio.create_task(read(client, call))
        await asyncio.sleep(0)
        assert await client.abort(call.request_id) == Receipt(3, None)
        with pytest.raises(EngineFailed, match="stopped"):
            await reading


async def test_call_that_a_frozen_replica_does_not_answer_can_be_aborted(start: Start) -> None:
    replica = start()
    async with client_of(replica) as client:
        assert (await client.readiness(5.0))[0] == "ready"
        replica.signal(signal.SIGSTOP)
        call = call_of()
        reading = asyncio.create_task(read(client, call))
        await asyncio.sleep(0)
        assert await client.abort(call.request_id) == Receipt(0, None)
        with pytest.raises(EngineFailed, match="stopped"):
            async with asyncio.timeout(20):
                await reading


async def test_abort_ends_a_call_whose_replica_is_dead(start: Start) -> None:
    replica = start()
    async with client_of(replica) as client:
        call = call_of()
        reading = asyncio.create_task(read(client, call, at=20, act=replica.child.kill))
        await eventually(lambda: replica.child.process is None)
        receipt = await client.abort(call.request_id)
        with pytest.raises(EngineFailed, match="stopped"):
            await reading
    assert receipt.tokens is not None
    assert receipt.tokens >= 20
    assert receipt.freed_ms is None


async def test_aborts_at_random_moments_leave_nothing_running(start: Start) -> None:
    replica = start(engine_max_ongoing="8", scripted_itl_ms="2")
    draw = random.Random(5)

    async def one(client: EngineClient, number: int) -> None:
        call = call_of(5000, sampling=Sampling(seed=number))
        reading = asyncio.create_task(read(client, call))
        await asyncio.sleep(draw.uniform(0, 0.15))
        await (client.abort(call.request_id) if draw.random() < 0.7 else cancel(reading))
        with pytest.raises((EngineFailed, asyncio.CancelledError)):
            await reading

    async with client_of(replica) as client:
        for number in range(0, 200, 20):
            await asyncio.gather(*(one(client, number + offset) for offset in range(20)))
        await eventually(lambda: replica.metric("onebox_engine_running") == 0)
        assert (await read(client, call_of(5)))[2].completion_tokens == 5


@pytest.fixture
def pair(start: Start) -> tuple[Replica, Replica]:
    """Two replicas, each with both in its roster."""
    ports = free_port(), free_port()
    doors = [f"http://127.0.0.1:{port}" for port in ports]
    limits = {"engine_max_ongoing": str(PLACES), "engine_max_queued": str(QUEUED)}
    first, second = (start("--fleet", *doors, port=port, **limits) for port in ports)
    return first, second


async def knows_both(client: EngineClient) -> None:
    """The client sends requests straight to both replicas from now on."""
    await read(client, call_of(1))
    await eventually(lambda: client.places() == 2 * PLACES)


async def home_of(client: EngineClient, replicas: Sequence[Replica], key: str) -> tuple[Replica, Replica]:
    """The replica where this key goes, and the other one."""
    before = [replica.metric(SERVED) for replica in replicas]
    await read(client, call_of(1, affinity=key))
    served = [replica.metric(SERVED) > count for replica, count in zip(replicas, before, strict=True)]
    return (replicas[0], replicas[1]) if served[0] else (replicas[1], replicas[0])


async def test_calls_of_one_key_go_straight_to_one_replica_and_elsewhere_once_it_is_dead(
    pair: tuple[Replica, Replica],
) -> None:
    reasons: list[str] = []
    async with ingress_of(pair[0].port) as ingress, client_of(ingress, reasons) as client:
        await knows_both(client)
        connections = ingress.connections
        home, other = await home_of(client, pair, "key")
        assert await home_of(client, pair, "key") == (home, other)
        whole = await read(client, call_of(affinity="key"))
        again = await read(client, call_of(affinity="key"), at=60, act=home.child.kill)
        assert again == whole
        before = other.metric(SERVED)
        await read(client, call_of(1, affinity="key"))
        assert other.metric(SERVED) == before + 1
        assert ingress.connections == connections
    assert reasons == ["cut"]


async def test_replica_that_leaves_takes_nothing_new_and_ends_what_it_has(pair: tuple[Replica, Replica]) -> None:
    reasons: list[str] = []
    async with ingress_of(pair[0].port) as ingress, client_of(ingress, reasons) as client:
        await knows_both(client)
        home, other = await home_of(client, pair, "key")
        reading = asyncio.create_task(read(client, call_of(affinity="key")))
        await eventually(lambda: home.metric("onebox_engine_running") == 1)
        home.signal(signal.SIGUSR1)
        await eventually(lambda: home.metric("onebox_engine_draining") == 1)
        before = other.metric(SERVED)
        assert (await read(client, call_of(1, affinity="key")))[2].completion_tokens == 1
        assert other.metric(SERVED) == before + 1
        assert (await reading)[2].completion_tokens == TOKENS
    assert reasons == []


async def test_full_replica_is_passed_over_and_a_full_fleet_refuses(pair: tuple[Replica, Replica]) -> None:
    async with ingress_of(pair[0].port) as ingress, client_of(ingress) as client:
        await knows_both(client)
        waiting = [
            asyncio.create_task(read(client, call_of(1000, affinity="key"))) for _ in range(2 * (PLACES + QUEUED))
        ]
        await eventually(lambda: sum(replica.metric("onebox_engine_waiting") for replica in pair) == 2 * QUEUED)
        with pytest.raises(Overloaded) as refused:
            await read(client, call_of(1, affinity="key"))
        assert refused.value.retry_after_s
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_gateways_that_know_nothing_of_each_other_fill_every_place(pair: tuple[Replica, Replica]) -> None:
    async with ingress_of(pair[0].port) as ingress, client_of(ingress) as one, client_of(ingress) as another:
        await knows_both(one)
        await knows_both(another)
        keys = [f"key {number}" for number in range(PLACES)]
        reading = [
            asyncio.create_task(read(client, call_of(1000, affinity=key))) for client in (one, another) for key in keys
        ]
        await eventually(lambda: sum(replica.metric("onebox_engine_running") for replica in pair) == 2 * PLACES)
        assert [replica.metric("onebox_engine_waiting") for replica in pair] == [0, 0]
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def test_ingress_is_the_way_while_no_door_can_be_reached(start: Start) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    replica = start("--door", nowhere, "--fleet", nowhere)
    async with ingress_of(replica.port) as ingress, client_of(ingress) as client:
        for _ in range(3):
            assert (await read(client, call_of(5, affinity="key")))[2].completion_tokens == 5
        assert replica.metric(SERVED) == 3


async def cancel(task: "asyncio.Task[object]") -> None:
    task.cancel()


async def eventually(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; the event loop goes on in between."""
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)
