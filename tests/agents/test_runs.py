"""Runs that outlive their worker: another one goes on where it died, and nobody sees a token twice or not at all."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from deploy.store import EmbeddedStore, prepare
from onebox.client import Client
from onebox.events import Accepted, Completed, Event, Failed, Stopped, TextDelta, is_terminal
from onebox.messages import Message, user
from onebox.sockets import free_port
from tests.agents.conftest import store_child
from tests.agents.processes import ADMIN_KEY, Child, Stack, run_stack, until

SHORT_LEASE = {"lease_s": "1.5", "lease_renew_s": "0.4"}
STORY = [user("Tell a long story about a lighthouse")]
LONG_TEXT = "\n\n".join(
    f"Part {part}. " + "The keeper of the light wrote down what the sea brought in the night. " * 40
    for part in range(12)
)


@dataclass(frozen=True)
class Pair:
    """Two workers of one store and one engine."""

    stack: Stack
    second: Child
    clients: tuple[Client, Client]
    redis: "Redis"

    def worker(self, index: int) -> Child:
        """The worker that `clients[index]` speaks to."""
        return (self.stack.gateway, self.second)[index]

    def signal(self, index: int, number: int) -> None:
        """Send a signal to a worker."""
        process = self.worker(index).process
        assert process is not None
        os.kill(process.pid, number)

    async def log(self, run_id: str) -> list[bytes]:
        """The stored events of a run."""
        rows: list[bytes] = await self.redis.lrange(f"onebox:{{default}}:run:{run_id}:events", 0, -1)  # type: ignore[misc]
        return rows


@pytest.fixture(scope="module")
def stack(valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with run_stack(Stack(tmp_path_factory.mktemp("runs"), valkey, SHORT_LEASE)) as running:
        yield running


@pytest.fixture(scope="module")
def second(stack: Stack) -> Iterator[tuple[Child, int]]:
    port = free_port()
    child = stack.worker(port)
    child.start()
    yield child, port
    child.stop()


@pytest_asyncio.fixture
async def pair(stack: Stack, second: tuple[Child, int]) -> AsyncIterator[Pair]:
    child, port = second
    if stack.gateway.process is None:
        stack.gateway.start()
    redis = Redis.from_url(stack.embedded.url)
    try:
        async with Client(stack.url, ADMIN_KEY) as one, Client(f"http://127.0.0.1:{port}", ADMIN_KEY) as two:
            yield Pair(stack, child, (one, two), redis)
    finally:
        await redis.aclose()


async def read(client: Client, run_id: str, after: int = -1, limit: int | None = None) -> list[tuple[int, Event]]:
    """The events of a run, at most `limit` of them."""
    seen: list[tuple[int, Event]] = []
    async with aclosing(client.follow(run_id, after)) as events:
        async for number, event in events:
            seen.append((number, event))
            if len(seen) == limit:
                break
    return seen


def text_of(seen: list[tuple[int, Event]]) -> str:
    return "".join(event.text for _, event in seen if isinstance(event, TextDelta))


def assert_whole(seen: list[tuple[int, Event]]) -> None:
    assert [number for number, _ in seen] == list(range(len(seen)))
    assert [is_terminal(event) for _, event in seen] == [False] * (len(seen) - 1) + [True]


TOLD: dict[tuple[str, str], str] = {}


async def undisturbed(client: Client, messages: list[Message], model: str = "chat") -> str:
    """What a run says to which nothing happens: the engine says always the same, so it is asked once."""
    asked = (model, messages[-1].text)
    if asked not in TOLD:
        run = await client.start(messages, model=model)
        seen = await read(client, run.run_id)
        assert_whole(seen)
        assert isinstance(seen[-1][1], Completed)
        TOLD[asked] = text_of(seen)
    return TOLD[asked]


@pytest.mark.parametrize("events", [1, 3, 8, 20])
async def test_reply_of_a_killed_worker_goes_on_at_the_other_one(pair: Pair, events: int) -> None:
    expected = await undisturbed(pair.clients[1], STORY)
    conversation = await pair.clients[1].create_conversation()
    run = await pair.clients[0].start(STORY, model="chat", conversation=conversation)
    before = await read(pair.clients[0], run.run_id, limit=events)
    pair.worker(0).kill()
    after = await read(pair.clients[1], run.run_id, after=before[-1][0])
    seen = before + after
    assert_whole(seen)
    assert isinstance(seen[-1][1], Completed)
    assert text_of(seen) == expected
    (turn,) = (await pair.clients[1].conversation(conversation)).turns
    assert [(v.run_id, v.state, v.text) for v in turn.variants] == [(run.run_id, "completed", expected)]
    assert len(await pair.log(run.run_id)) == len(seen)


async def test_summary_of_many_parts_goes_on_without_its_finished_calls(pair: Pair) -> None:
    task = [user(f"Summarize this:\n\n{LONG_TEXT}")]
    expected = await undisturbed(pair.clients[1], task, "summarize")
    for events in (5, 9):
        run = await pair.clients[0].start(task, model="summarize")
        before = await read(pair.clients[0], run.run_id, limit=events)
        pair.worker(0).kill()
        after = await read(pair.clients[1], run.run_id, after=before[-1][0])
        assert_whole(before + after)
        assert isinstance(after[-1][1], Completed), after[-1]
        assert text_of(before + after) == expected
        pair.worker(0).start()


async def test_worker_that_wakes_up_too_late_writes_nothing(pair: Pair) -> None:
    expected = await undisturbed(pair.clients[1], STORY)
    run = await pair.clients[0].start(STORY, model="chat")
    sleeper = asyncio.create_task(read(pair.clients[0], run.run_id))
    before = await read(pair.clients[1], run.run_id, limit=6)
    pair.signal(0, signal.SIGSTOP)
    try:
        after = await read(pair.clients[1], run.run_id, after=before[-1][0])
    finally:
        pair.signal(0, signal.SIGCONT)
    assert_whole(before + after)
    assert text_of(before + after) == expected
    assert await asyncio.wait_for(sleeper, 20) == before + after
    await asyncio.sleep(1.0)
    assert len(await pair.log(run.run_id)) == len(before + after)
    until(lambda: pair.stack.engine_running() == 0, 5.0)


async def test_reader_of_another_worker_sees_what_the_owner_wrote(pair: Pair) -> None:
    run = await pair.clients[0].start(STORY, model="chat")
    at_owner, elsewhere, late = await asyncio.gather(
        read(pair.clients[0], run.run_id), read(pair.clients[1], run.run_id), read(pair.clients[1], run.run_id, after=9)
    )
    assert_whole(at_owner)
    assert elsewhere == at_owner
    assert late == at_owner[10:]
    assert await read(pair.clients[1], run.run_id) == at_owner


@pytest.mark.parametrize("index", [0, 1])
async def test_stop_ends_a_run_with_a_receipt_from_any_worker(pair: Pair, index: int) -> None:
    conversation = await pair.clients[1].create_conversation()
    run = await pair.clients[0].start(STORY, model="chat", max_tokens=500, conversation=conversation)
    reader = asyncio.create_task(read(pair.clients[1], run.run_id))
    await read(pair.clients[0], run.run_id, limit=8)
    receipt = await pair.clients[index].cancel(run.run_id)
    seen = await reader
    assert_whole(seen)
    assert seen[-1][1] == receipt
    assert isinstance(receipt, Stopped)
    assert receipt.tokens > 0
    assert receipt.tokens + receipt.not_generated == 500
    assert receipt.slot_freed_ms is not None
    assert pair.stack.engine_running() == 0
    assert await pair.clients[1 - index].cancel(run.run_id) == receipt
    (turn,) = (await pair.clients[1].conversation(conversation)).turns
    assert turn.variants[0].receipt == receipt


async def test_stop_of_a_run_whose_worker_is_stuck_ends_it_at_another(pair: Pair) -> None:
    run = await pair.clients[0].start(STORY, model="chat")
    before = await read(pair.clients[1], run.run_id, limit=8)
    pair.signal(0, signal.SIGSTOP)
    try:
        receipt = await pair.clients[1].cancel(run.run_id)
    finally:
        pair.signal(0, signal.SIGCONT)
    assert isinstance(receipt, Stopped)
    seen = await read(pair.clients[1], run.run_id)
    assert_whole(seen)
    assert seen[: len(before)] == before
    until(lambda: pair.stack.engine_running() == 0, 5.0)


async def test_worker_that_leaves_gives_its_runs_away_at_once(pair: Pair) -> None:
    expected = await undisturbed(pair.clients[1], STORY)
    run = await pair.clients[0].start(STORY, model="chat")
    before = await read(pair.clients[1], run.run_id, limit=6)
    pair.worker(0).stop()
    after = await read(pair.clients[1], run.run_id, after=before[-1][0])
    assert_whole(before + after)
    assert isinstance(after[-1][1], Completed)
    assert text_of(before + after) == expected


async def test_everything_that_crashed_at_once_is_ended_after_the_next_start(tmp_path: Path) -> None:
    embedded = prepare(tmp_path / "store")
    store = store_child(embedded, tmp_path)
    store.start()
    try:
        with run_stack(Stack(tmp_path, embedded, SHORT_LEASE)) as stack:
            async with Client(stack.url, ADMIN_KEY) as client:
                expected = await undisturbed(client, STORY)
                runs = [await client.start(STORY, model="chat") for _ in range(5)]
                await read(client, runs[-1].run_id, limit=6)
                for child in (stack.gateway, stack.engine, store):
                    child.kill()
                for child in (store, stack.engine, stack.gateway):
                    child.start()
                for run in runs:
                    seen = await asyncio.wait_for(read(client, run.run_id), 30)
                    assert_whole(seen)
                    assert text_of(seen) == expected
    finally:
        store.stop()


async def test_run_without_an_engine_to_go_on_at_ends_in_time(tmp_path: Path, valkey: EmbeddedStore) -> None:
    limits = SHORT_LEASE | {"engine_patience_s": "2"}
    with run_stack(Stack(tmp_path, valkey, limits)) as stack:
        async with Client(stack.url, ADMIN_KEY) as client:
            conversation = await client.create_conversation()
            run = await client.start(STORY, model="chat", conversation=conversation)
            before = await read(client, run.run_id, limit=8)
            stack.engine.kill()
            after = await asyncio.wait_for(read(client, run.run_id, after=before[-1][0]), 15)
            ended = after[-1][1]
            assert isinstance(ended, Failed)
            assert ended.retryable
            (turn,) = (await client.conversation(conversation)).turns
            assert turn.variants[0].state == "failed"
            assert turn.variants[0].text == text_of(before + after)


async def test_key_that_was_used_joins_its_run_or_is_refused(pair: Pair) -> None:
    conversation = await pair.clients[0].create_conversation()

    def ask(text: str) -> dict[str, object]:
        return {"input": text, "model": "chat", "conversation": conversation, "background": True}

    async with httpx.AsyncClient(headers={**pair.stack.headers, "idempotency-key": "one"}, timeout=30) as http:
        url = f"{pair.stack.url}/v1/responses"
        replies = await asyncio.gather(*[http.post(url, json=ask("Hello there")) for _ in range(8)])
        assert {reply.status_code for reply in replies} == {200}
        (run_id,) = {reply.json()["id"] for reply in replies}
        other = await http.post(url, json=ask("Good bye"))
        assert other.status_code == 422
        assert other.json()["error"]["code"] == "idempotency_mismatch"
    await read(pair.clients[1], run_id)
    assert len((await pair.clients[1].conversation(conversation)).turns) == 1


async def test_log_that_is_switched_off_shows_the_same_reply_and_stores_none(pair: Pair) -> None:
    expected = await undisturbed(pair.clients[0], STORY)
    port = free_port()
    unlogged = pair.stack.worker(port, log_enabled="false")
    unlogged.start()
    try:
        async with Client(f"http://127.0.0.1:{port}", ADMIN_KEY) as client:
            seen = [event async for event in client.stream(STORY, model="chat")]
        assert "".join(event.text for event in seen if isinstance(event, TextDelta)) == expected
        assert isinstance(seen[-1], Completed)
        accepted = seen[0]
        assert isinstance(accepted, Accepted)
        assert await pair.log(accepted.run_id) == []
    finally:
        unlogged.stop()
