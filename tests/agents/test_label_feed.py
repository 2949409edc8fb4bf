"""Labels on their own: what one is, how they are kept, and how they reach the router of every worker."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agents import label_feed
from agents.conversations import Conversations
from agents.corrections import Corrections
from agents.label_feed import FAILED, NOT_YET, SWITCHED_OFF, LabelFeed
from agents.labels import MESSAGES_MAX, TEXT_MAX, Labels, new_label
from agents.run_store import RunRecord, RunRequest
from agents.store import Argument, Store
from agents.store_keys import LabelKeys
from deploy.store import EmbeddedStore, prepare
from onebox.errors import StoreUnavailable
from onebox.events import Routed
from onebox.labels import Label, LabelScope, Learning
from onebox.messages import Message, assistant, system, user
from onebox.settings import Settings
from onebox.sockets import free_port
from tests.agents.conftest import store_child
from tests.agents.processes import Child, until_async


class Pupil:
    """A router that says which labels it was given, and refuses those that ask for `refused`, or fails at all."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.failing = False
        self.lessons = 0
        self.shared: list[Label] = []
        self.own: dict[str, list[Label]] = {}

    async def learn(self, shared: Sequence[Label], own: Mapping[str, Sequence[Label]]) -> Mapping[str, str]:
        self.lessons += 1
        if self.failing:
            raise ArithmeticError("This pupil learns nothing.")
        self.shared, self.own = list(shared), {tenant: list(labels) for tenant, labels in own.items()}
        every = [*shared, *(label for labels in own.values() for label in labels)]
        return {label.id: "No room." for label in every if label.plan == (self.refused,)}


class Worker:
    """What one gateway worker has of labels."""

    def __init__(self, embedded: EmbeddedStore, pupil: Pupil, most: int = 2000) -> None:
        self.store = Store(Settings(redis_url=embedded.url))
        self.labels = Labels(self.store, "tenant", most)
        self.pupil = pupil
        self.feed = LabelFeed(self.store, self.labels, pupil)

    async def listeners(self) -> int:
        """How many workers are told of a change."""
        ((_, count),) = await self.store.transaction([("PUBSUB", "NUMSUB", label_feed.CHANNEL)])
        return int(count)


class HeldReplies:
    """Stands before a store's scripts: they are executed at once, and the nth one's reply waits for `let`."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.executed = 0
        self._run = store.run
        self._let: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        monkeypatch.setattr(store, "run", self._held)

    def let(self, number: int) -> None:
        """Let the reply of this script through."""
        self._let[number].set()

    async def _held(self, script: str, keys: Sequence[str], args: Sequence[Argument]) -> object:
        reply: object = await self._run(script, keys, args)
        self.executed += 1
        await self._let[self.executed].wait()
        return reply


Open = Callable[..., Awaitable[Worker]]


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[tuple[EmbeddedStore, Child]]:
    """A store of the test's own, running."""
    embedded = prepare(tmp_path)
    child = store_child(embedded, tmp_path)
    child.start()
    yield embedded, child
    child.stop()


@pytest.fixture
async def worker(own_store: tuple[EmbeddedStore, Child]) -> AsyncIterator[Open]:
    """Opens workers over the test's own store."""
    opened: list[Worker] = []

    async def open_(refused: str = "", most: int = 2000) -> Worker:
        made = Worker(own_store[0], Pupil(refused), most)
        await made.feed.__aenter__()
        opened.append(made)
        async with asyncio.timeout(10):
            while await made.listeners() < len(opened):
                await asyncio.sleep(0.01)
        return made

    yield open_
    for made in opened:
        await made.feed.__aexit__(None, None, None)
        await made.store.close()


def label(text: str, task: str, tenant: str = "a", scope: LabelScope = "tenant") -> Label:
    return new_label(tenant, "api", [user(text)], [task], [], scope)


def texts(labels: Sequence[Label]) -> list[str]:
    return [one.messages[-1].text for one in labels]


def run_of(text: str) -> RunRecord:
    return RunRecord("resp_1", "a", "running", 0.0, None, None, RunRequest("resp_1", "a", (user(text),)))


def hold_learning(labels: Labels, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Whoever asks first what a tenant lets be learned is answered when this is set; others are at once."""
    learning, first, answered = labels.learning, iter([True]), asyncio.Event()

    async def held(tenant: str) -> Learning:
        if next(first, False):
            await answered.wait()
        return await learning(tenant)

    monkeypatch.setattr(labels, "learning", held)
    return answered


async def announcing(one: Worker, monkeypatch: pytest.MonkeyPatch) -> tuple[Labels, HeldReplies, asyncio.Task[None]]:
    """Labels of which the first is being added: it has been announced, and the reply to that is held."""
    labels, replies = Labels(one.store, "tenant"), HeldReplies(one.store, monkeypatch)
    replies.let(1)
    adding = asyncio.create_task(labels.add("a", label("One", "qa")))
    await until_async(lambda: replies.executed == 2)
    return labels, replies, adding


def test_label_keeps_what_the_router_saw_and_of_long_texts_both_ends() -> None:
    said: list[Message] = [system("Be kind."), *(user(str(number)) for number in range(9))]
    long = f"Begin {'x' * TEXT_MAX} end"
    made = new_label("a", "api", [*said, user(long), assistant("An answer")], ["qa"], [], "tenant")
    assert len(made.messages) == MESSAGES_MAX
    assert [message.text for message in made.messages[:-1]] == ["4", "5", "6", "7", "8"]
    cut = made.messages[-1].text
    assert len(cut) == TEXT_MAX
    assert cut.startswith("Begin x")
    assert cut.endswith("x end")


def test_same_message_has_one_label_in_each_tenant() -> None:
    assert label("Hello", "qa").id == label("Hello", "write").id
    assert label("Hello", "qa").id != label("Hello", "qa", "b").id


async def test_label_of_one_worker_is_told_to_every_other(worker: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_feed, "CHECK_S", 3600.0)
    one, two = await worker(), await worker()
    made = label("One", "qa")
    assert two.feed.reason(made) == NOT_YET
    await one.labels.add("a", made)
    await until_async(lambda: texts(two.pupil.own.get("a", ())) == ["One"] and one.feed.reason(made) is None)
    assert two.feed.reason(made) is None
    assert await one.labels.remove("a", made.id)
    await until_async(lambda: one.pupil.own == two.pupil.own == {})
    assert not await one.labels.remove("a", made.id)


async def test_change_whose_message_was_lost_is_found(worker: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_feed, "CHANNEL", "onebox:elsewhere")
    monkeypatch.setattr(label_feed, "CHECK_S", 0.1)
    one = await worker()
    await one.labels.add("a", label("One", "qa"))
    await until_async(lambda: texts(one.pupil.own.get("a", ())) == ["One"])


async def test_label_added_while_another_one_is_announced_is_announced_too(
    worker: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, replies, first = await announcing(await worker(), monkeypatch)
    second = asyncio.create_task(labels.add("a", label("Two", "qa")))
    await until_async(lambda: replies.executed == 3)
    announced = (await labels.changes(0)).version
    replies.let(2)
    await first
    for number in (3, 4):
        replies.let(number)
    await second
    assert (await labels.changes(announced)).tenants == ("a",)


async def test_announcement_that_was_broken_off_is_made_at_the_next_call(
    worker: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, replies, adding = await announcing(await worker(), monkeypatch)
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    announced = (await labels.changes(0)).version
    replies.let(3)
    await labels.announce()
    assert (await labels.changes(announced)).tenants == ("a",)


async def test_burst_of_labels_is_a_few_lessons_in_the_order_they_were_made(worker: Open) -> None:
    one, two = await worker(), await worker()
    names = [f"{number}" for number in range(40)]
    for name in names:
        await one.labels.add("a", label(name, "qa"))
    await until_async(lambda: texts(two.pupil.own.get("a", ())) == names)
    assert two.pupil.lessons < len(names)


async def test_label_that_the_router_refuses_says_why(worker: Open) -> None:
    one = await worker("write")
    good, bad = label("Good", "qa"), label("Bad", "write")
    for made in (good, bad):
        await one.labels.add("a", made)
    await until_async(lambda: one.feed.reason(bad) == "No room.")
    assert one.feed.reason(good) is None
    again = label("Bad", "qa")
    assert one.feed.reason(again) == NOT_YET, "another label has taken its place"


async def test_record_that_cannot_be_read_is_left_out_with_a_warning(
    worker: Open, caplog: pytest.LogCaptureFixture
) -> None:
    one = await worker()
    keys, newer = LabelKeys("a"), label("Written by a newer version", "qa")
    record = b'{"id": 1}'
    await one.store.transaction([("HSET", keys.labels, newer.id, record), ("ZADD", keys.order, 1, newer.id)])
    await one.labels.add("a", label("One", "qa"))
    await one.labels.add("b", label("Two", "qa", "b"))
    await until_async(lambda: set(one.pupil.own) == {"a", "b"})
    assert (texts(one.pupil.own["a"]), texts(one.pupil.own["b"])) == (["One"], ["Two"])
    page, _ = await one.labels.page("a", 10, None)
    assert texts(page) == ["One"]
    assert await one.labels.get("a", newer.id) is None
    assert any(newer.id in logged.message for logged in caplog.records)


async def test_lesson_that_failed_is_given_again(worker: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_feed, "CHECK_S", 0.1)
    one = await worker()
    one.pupil.failing = True
    made = label("One", "qa")
    await one.labels.add("a", made)
    await until_async(lambda: one.feed.reason(made) == FAILED)
    one.pupil.failing = False
    await until_async(lambda: one.feed.reason(made) is None)
    assert texts(one.pupil.own["a"]) == ["One"]
    lessons = one.pupil.lessons
    await one.feed._look()
    assert one.pupil.lessons == lessons, "it was learned"


async def test_labels_are_shared_only_while_their_tenant_lets_them(worker: Open) -> None:
    one, two = await worker(), await worker()
    await one.labels.set_learning("a", "global")
    everybodys, mine = label("Shared", "qa", scope="global"), label("Mine", "qa")
    for made in (everybodys, mine):
        await one.labels.add("a", made)
    await one.labels.add("b", label("Theirs", "qa", "b"))
    await until_async(lambda: "b" in two.pupil.own and texts(two.pupil.own.get("a", ())) == ["Mine"])
    assert texts(two.pupil.shared) == ["Shared"]
    await one.labels.set_learning("a", "tenant")
    await until_async(lambda: two.pupil.shared == [] and texts(two.pupil.own["a"]) == ["Shared", "Mine"])
    await one.labels.set_learning("a", "off")
    await until_async(lambda: set(two.pupil.own) == {"b"})
    await until_async(lambda: one.feed.reason(mine) == SWITCHED_OFF)
    assert [one.id for one in await two.labels.all("a")] == [everybodys.id, mine.id]


async def test_oldest_label_of_a_tenant_leaves_when_there_are_too_many(worker: Open) -> None:
    one = await worker(most=3)
    await one.labels.add("b", label("Theirs", "qa", "b"))
    for name in ("1", "2", "3", "1", "4"):
        await one.labels.add("a", label(name, "qa"))
    assert texts(await one.labels.all("a")) == ["3", "1", "4"]
    await until_async(lambda: texts(one.pupil.own.get("a", ())) == ["3", "1", "4"])
    assert texts(await one.labels.all("b")) == ["Theirs"]


async def test_labels_are_read_in_pages_that_a_new_one_does_not_shift(worker: Open) -> None:
    one = await worker()
    for number in range(5):
        await one.labels.add("a", label(str(number), "qa"))
    page, following = await one.labels.page("a", 2, None)
    assert texts(page) == ["4", "3"]
    await one.labels.add("a", label("5", "qa"))
    page, following = await one.labels.page("a", 2, following)
    assert texts(page) == ["2", "1"]
    page, following = await one.labels.page("a", 2, following)
    assert (texts(page), following) == (["0"], None)


async def test_router_is_left_alone_where_nobody_has_a_label(worker: Open) -> None:
    one = await worker()
    await one.labels.set_learning("a", "global")
    for _ in range(3):
        await one.feed._look()
    assert one.pupil.lessons == 0


async def test_labels_survive_a_store_that_is_away_and_one_that_nobody_could_be_told_of_is_found(
    worker: Open, own_store: tuple[EmbeddedStore, Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await worker(), await worker()
    await one.labels.add("a", label("Before", "qa"))
    await until_async(lambda: texts(two.pupil.own.get("a", ())) == ["Before"])
    run = one.store.run

    async def run_last(script: str, keys: Sequence[str], args: Sequence[Argument]) -> object:
        reply: object = await run(script, keys, args)
        own_store[1].kill()
        return reply

    with monkeypatch.context() as patch:
        patch.setattr(one.store, "run", run_last)
        await one.labels.add("a", label("Last", "qa"))
    with pytest.raises(StoreUnavailable):
        await one.labels.add("a", label("Refused", "qa"))
    with pytest.raises(StoreUnavailable):
        await two.feed._look()
    assert texts(two.pupil.own["a"]) == ["Before"]
    own_store[1].start()
    await until_async(lambda: texts(two.pupil.own["a"]) == ["Before", "Last"], 30)


async def test_labels_of_a_store_that_has_lost_everything_are_forgotten(worker: Open) -> None:
    one = await worker()
    for number in range(3):
        await one.labels.add("a", label(str(number), "qa"))
    await until_async(lambda: len(one.pupil.own.get("a", ())) == 3)
    await one.store.transaction([("FLUSHALL",)])
    await one.labels.add("b", label("New", "qa", "b"))
    await until_async(lambda: set(one.pupil.own) == {"b"})


async def test_correction_of_what_was_learned_keeps_what_was_decided_first(worker: Open) -> None:
    one = await worker()
    run = run_of("Hello")
    async with Corrections(one.labels, Conversations(one.store)) as corrections:
        for decided, right, kept in (
            ("chat", "write", [(("write",), ("chat",))]),
            ("write", "reason", [(("reason",), ("chat",))]),  # it was learned
            ("reason", "write", [(("write",), ("chat",))]),
            ("write", "chat", []),
        ):
            corrections.replanned(run, Routed(decided, (decided,), {}, "head", 1.0), [right])
            await until_async(lambda: not corrections._tasks)
            assert [(made.plan, made.was) for made in await one.labels.all("a")] == kept
        corrections.replanned(run, Routed("qa", ("qa",), {}, "explicit", 1.0), ["chat"])
        await until_async(lambda: not corrections._tasks)
        assert await one.labels.all("a") == []


async def test_corrections_are_noted_in_the_order_they_were_made(worker: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await worker()
    answered = hold_learning(one.labels, monkeypatch)
    run, decided = run_of("Hello"), Routed("chat", ("chat",), {}, "head", 1.0)
    async with Corrections(one.labels, Conversations(one.store)) as corrections:
        for right in ("write", "chat"):
            corrections.replanned(run, decided, [right])
        for _ in range(10):  # the second one, which nothing holds, would be done
            await one.labels.all("a")
        answered.set()
        await until_async(lambda: not corrections._tasks)
    assert await one.labels.all("a") == []


@pytest.mark.parametrize(("plan", "was"), [("write", ()), ("chat", ("chat",))], ids=["noted", "taken back"])
async def test_correction_that_is_noted_or_taken_back_late_leaves_a_newer_one(
    worker: Open, monkeypatch: pytest.MonkeyPatch, plan: str, was: tuple[str, ...]
) -> None:
    one = await worker()
    answered = hold_learning(one.labels, monkeypatch)
    async with Corrections(one.labels, Conversations(one.store)) as corrections:
        corrections.replanned(run_of("Hello"), Routed("chat", ("chat",), {}, "head", 1.0), [plan])
        newer = replace(label("Hello", "reason"), was=was)
        await one.labels.add("a", newer)
        answered.set()
        await until_async(lambda: not corrections._tasks)
    assert await one.labels.all("a") == [newer]
    assert await one.labels.remove("a", newer.id)
    assert await one.labels.all("a") == []


async def test_correction_is_lost_with_one_warning_while_the_store_is_away(caplog: pytest.LogCaptureFixture) -> None:
    store = Store(Settings(redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    labels = Labels(store, "tenant")
    with caplog.at_level(logging.WARNING):
        async with Corrections(labels, Conversations(store)) as corrections:
            for _ in range(3):
                corrections.rated("a", "conv_1", "resp_1", "like")
                await until_async(lambda: not corrections._tasks)
    assert [record.message for record in caplog.records if "correction" in record.message] == [
        "The store is away, so corrections are not noted until it is back"
    ]
    await store.close()
