"""Places, the queue before them and what is refused: with a clock of the test's own, and no engine."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from agents.admission import Admission, Claim
from agents.generation import End
from agents.metrics import Metrics
from agents.places import OpenCall, Places
from agents.shares import share_of
from agents.store import Store
from deploy.store import EmbeddedStore
from onebox.errors import Overloaded, RateLimited
from onebox.messages import user
from onebox.settings import Settings
from tests.agents.processes import until_async

PROMPT = [user("Tell a story about a lighthouse")]


@dataclass
class Bench:
    """An admission for one model, its clock, and what its runs were told."""

    settings: dict[str, Any]
    store: Store
    places_count: int = 2
    now: float = 100.0
    told: dict[str, list[tuple[int, float | None]]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    asking: "list[asyncio.Task[OpenCall]]" = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = Settings(**self.settings)
        self.admission = Admission(settings, Metrics(), self.store, {"": lambda: self.places_count}, lambda: self.now)

    @property
    def places(self) -> Places:
        return self.admission.places("")

    def claim(self, name: str, tenant: str = "a", *, begun: bool = False, at: int = 0) -> Claim:
        told = self.told.setdefault(name, [])
        return self.admission.claim(tenant, lambda *where: told.append(where), begun=begun, told=at)

    async def run(self, name: str, tenant: str = "a") -> "Run":
        """A run that asks for its first call; it may have to wait."""
        run = Run(self, name, self.claim(name, tenant))
        run.asking = asyncio.create_task(run.ask())
        self.asking.append(run.asking)
        await settle()
        return run

    async def end(self) -> None:
        """End whoever still waits."""
        for task in self.asking:
            task.cancel()
        await asyncio.gather(*self.asking, return_exceptions=True)


@dataclass
class Run:
    """One run of a test."""

    bench: Bench
    name: str
    claim: Claim
    asking: "asyncio.Task[OpenCall] | None" = None

    async def ask(self) -> OpenCall:
        call = await self.claim.open("", PROMPT, 100)
        self.bench.order.append(self.name)
        return call

    @property
    def entered(self) -> bool:
        assert self.asking is not None
        return self.asking.done() and not self.asking.exception()

    async def end(self, held_s: float = 0.0, end: End | None = None) -> None:
        """It has kept its place for `held_s`."""
        self.bench.now += held_s
        assert self.asking is not None
        self.asking.result().close(end, 0)
        self.claim.leave()
        await settle()


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def make(valkey: EmbeddedStore) -> AsyncIterator[Callable[..., Bench]]:
    store = Store(Settings(redis_url=valkey.url))
    benches: list[Bench] = []

    def build(places: int = 2, **settings: Any) -> Bench:
        benches.append(Bench(settings, store, places))
        return benches[-1]

    yield build
    for bench in benches:
        await bench.end()
    await store.close()


async def test_run_with_a_free_place_waits_for_nothing_and_is_told_nothing(make: Callable[..., Bench]) -> None:
    bench = make(places=2)
    runs = [await bench.run("one"), await bench.run("two")]
    assert all(run.entered for run in runs)
    assert bench.told == {"one": [], "two": []}


async def test_those_beyond_the_places_wait_in_order_and_are_told_where(make: Callable[..., Bench]) -> None:
    bench = make(places=1)
    first, second, third = [await bench.run(name) for name in ("1", "2", "3")]
    assert (first.entered, second.entered, third.entered) == (True, False, False)
    assert [bench.told[name] for name in ("1", "2", "3")] == [[], [(1, None)], [(2, None)]]
    await first.end(held_s=4.0)
    assert (second.entered, third.entered) == (True, False)
    assert bench.told["2"] == [(1, None), (0, 0.0)]
    await second.end(held_s=4.0)
    assert bench.order == ["1", "2", "3"]


async def test_positions_are_told_when_they_change_and_once_a_second_at_most(make: Callable[..., Bench]) -> None:
    bench = make(places=1, queue_per_place=10.0)
    runs = [await bench.run(str(number)) for number in range(6)]
    bench.places.tell()
    assert bench.told["5"] == [(5, None)]
    await runs[0].end(held_s=0.5)
    bench.places.tell()
    assert bench.told["5"] == [(5, None)]
    bench.now += 0.5
    bench.places.tell()
    bench.places.tell()
    assert [position for position, _ in bench.told["5"]] == [5, 4]
    bench.now += 5
    bench.places.tell()
    assert [position for position, _ in bench.told["5"]] == [5, 4]


async def test_wait_is_told_from_how_long_runs_kept_their_places(make: Callable[..., Bench]) -> None:
    bench = make(places=2)
    runs = [await bench.run(str(number)) for number in range(4)]
    await runs[0].end(held_s=6.0)
    late = await bench.run("late")
    assert not late.entered
    assert bench.told["late"] == [(2, 6.0)]


async def test_single_run_of_another_tenant_passes_fifty(make: Callable[..., Bench]) -> None:
    bench = make(places=1, queue_per_place=100.0)
    crowd = [await bench.run(f"a{number}") for number in range(50)]
    single = await bench.run("single", tenant="b")
    assert bench.told["single"][0][0] <= 2
    await crowd[0].end()
    if not single.entered:
        await crowd[1].end()
    assert single.entered


async def test_run_that_is_over_leaves_the_queue(make: Callable[..., Bench]) -> None:
    bench = make(places=1)
    first, second, third = [await bench.run(name) for name in ("1", "2", "3")]
    assert second.asking is not None
    second.asking.cancel()
    second.claim.leave()
    await settle()
    assert bench.places.waiting == 1
    await first.end()
    assert third.entered
    await third.end()
    assert bench.places.used == 0


async def test_full_queue_refuses_at_once_and_says_when_to_come_back(make: Callable[..., Bench]) -> None:
    bench = make(places=2, queue_per_place=2.0)
    runs = [await bench.run(str(number)) for number in range(3)]
    bench.admission.check("a")
    await runs[0].end(held_s=8.0)
    for number in range(4):
        await bench.run(f"more {number}")
    with pytest.raises(Overloaded) as refusal:
        bench.admission.check("b")
    assert refusal.value.retry_after_s == pytest.approx(5 * 8.0 / 2)
    late = [await bench.run(f"let in before {number}") for number in range(4)]
    assert [bench.told[run.name][-1][0] for run in late] == [5, 6, 7, 8]
    last = await bench.run("last")
    assert last.asking is not None
    assert isinstance(last.asking.exception(), Overloaded)
    assert bench.told["last"] == []


async def test_runs_that_have_yet_to_ask_count_for_the_check(make: Callable[..., Bench]) -> None:
    bench = make(places=1, queue_per_place=1.0)
    claims = [bench.claim(str(number)) for number in range(2)]
    with pytest.raises(Overloaded):
        bench.admission.check("a")
    claims[0].leave()
    bench.admission.check("a")


async def test_tenant_with_all_its_places_waits_while_others_pass(make: Callable[..., Bench]) -> None:
    bench = make(places=3, tenant_max_running=1)
    first, second = await bench.run("a1"), await bench.run("a2")
    other = await bench.run("b1", tenant="b")
    assert (first.entered, second.entered, other.entered) == (True, False, True)
    await first.end()
    assert second.entered


async def test_tenant_with_too_many_waiting_is_refused_and_others_are_not(make: Callable[..., Bench]) -> None:
    bench = make(places=1, tenant_max_queued=2)
    for number in range(3):
        await bench.run(f"a{number}")
    with pytest.raises(RateLimited) as refusal:
        bench.admission.check("a")
    assert (refusal.value.code, refusal.value.status) == ("rate_limited", 429)
    assert refusal.value.retry_after_s
    bench.admission.check("b")
    assert not (await bench.run("b", tenant="b")).entered
    for number in range(2):
        assert (await bench.run(f"let in before {number}")).asking
    refused = await bench.run("a5")
    assert refused.asking is not None
    assert isinstance(refused.asking.exception(), RateLimited)


async def test_run_keeps_its_place_between_its_calls(make: Callable[..., Bench]) -> None:
    bench = make(places=1)
    plan = await bench.run("plan")
    newcomer = await bench.run("newcomer")
    assert plan.asking is not None
    plan.asking.result().close(End("stop", 10, 5), 5)
    await settle()
    assert not newcomer.entered
    step_two = await plan.claim.open("", PROMPT, 100)
    step_two.close(End("stop", 10, 5), 5)
    plan.claim.leave()
    await settle()
    assert newcomer.entered


async def test_calls_side_by_side_of_one_run_never_wait_and_newcomers_wait_for_them(
    make: Callable[..., Bench],
) -> None:
    bench = make(places=2)
    wide = bench.claim("wide")
    calls = [await wide.open("", PROMPT, 100) for _ in range(4)]
    assert bench.places.used == 4
    newcomer = await bench.run("newcomer")
    for call in calls[:2]:
        call.close(End("stop", 10, 5), 5)
    await settle()
    assert not newcomer.entered
    calls[2].close(None, 3)
    await settle()
    assert newcomer.entered
    calls[3].close(None, 3)
    wide.leave()
    assert bench.places.used == 1


async def test_calls_made_while_the_run_waits_enter_together(make: Callable[..., Bench]) -> None:
    bench = make(places=1)
    first = await bench.run("first")
    wide = bench.claim("wide")
    asking = [asyncio.create_task(wide.open("", PROMPT, 100)) for _ in range(3)]
    await settle()
    assert bench.places.waiting == 1
    await first.end()
    await settle()
    assert all(task.done() for task in asking)
    for task in asking:
        task.result().close(None, 0)
    wide.leave()
    assert bench.places.used == 0


async def test_run_that_had_begun_elsewhere_does_not_wait(make: Callable[..., Bench]) -> None:
    bench = make(places=1)
    await bench.run("first")
    taken = bench.claim("taken over", begun=True)
    await asyncio.wait_for(taken.open("", PROMPT, 100), 1.0)
    assert bench.places.used == 2


async def test_run_that_had_waited_elsewhere_is_told_that_its_turn_has_come(make: Callable[..., Bench]) -> None:
    bench = make(places=1)
    await asyncio.wait_for(bench.claim("taken over", at=3).open("", PROMPT, 100), 1.0)
    assert bench.told["taken over"] == [(0, 0.0)]


async def test_run_with_a_place_at_one_model_does_not_wait_at_another(valkey: EmbeddedStore) -> None:
    store = Store(Settings(redis_url=valkey.url))
    admission = Admission(Settings(), Metrics(), store, {"small": lambda: 1, "large": lambda: 1})
    first, second = (admission.claim("a", lambda *where: None) for _ in range(2))
    await first.open("small", PROMPT, 10)
    await second.open("large", PROMPT, 10)
    await asyncio.wait_for(asyncio.gather(first.open("large", PROMPT, 10), second.open("small", PROMPT, 10)), 1.0)
    await store.close()


async def test_place_that_comes_with_a_new_replica_is_given_at_once(make: Callable[..., Bench]) -> None:
    bench = make(places=1)
    await bench.run("first")
    second = await bench.run("second")
    bench.places.resize(share_of(2, ()))
    await settle()
    assert second.entered


async def test_two_workers_share_the_places_of_the_fleet(make: Callable[..., Bench]) -> None:
    one, two = make(places=4, share_interval_s=0.2), make(places=4, share_interval_s=0.2)
    async with one.admission, two.admission:
        runs = [await one.run(str(number)) for number in range(4)]
        assert all(run.entered for run in runs)
        await until_async(lambda: one.places.share == share_of(4, [0]) and two.places.share == share_of(4, [4]))
        assert not (await one.run("one too many")).entered
        others = [await two.run(str(number)) for number in range(3)]
        assert [run.entered for run in others] == [True, True, False]
