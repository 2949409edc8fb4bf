"""A box with few places, real store and real gateways: who waits, what they are told, and how waiting ends."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from deploy.store import EmbeddedStore
from onebox.client import Client
from onebox.events import Accepted, Completed, Event, Queued, Stopped, TextDelta, decode
from onebox.messages import user
from onebox.sockets import free_port
from tests.agents.processes import ADMIN_KEY, Stack, run_stack, until

PATH = "/v1/responses"
CHAT = "/v1/chat/completions"
FEW = {
    "engine_max_ongoing": "2",
    "engine_max_queued": "0",
    "queue_per_place": "100",
    "scripted_itl_ms": "40",
    "lease_s": "1.5",
    "lease_renew_s": "0.4",
}
LONG = 400  # tokens asked for; the engine draws more than 256, which takes it more than ten seconds


@pytest.fixture(scope="module")
def few(valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two places at the engine, none in its queue, many in the gateway's."""
    with run_stack(Stack(tmp_path_factory.mktemp("few"), valkey, FEW)) as running:
        yield running


@pytest.fixture
def full(few: Stack) -> Iterator[list[str]]:
    """Runs that have all places of the engine until the test stops them."""
    runs = [start(few, max_output_tokens=LONG)["id"] for _ in range(2)]
    until(lambda: few.engine_running() == 2)
    yield runs
    for run_id in runs:
        few.client.post(f"{PATH}/{run_id}/cancel")
    until(lambda: few.engine_running() == 0)


def start(
    stack: Stack, text: str = "Tell me about the river.", headers: dict[str, str] | None = None, **fields: object
) -> dict[str, Any]:
    body = {"model": "chat", "input": text, "max_output_tokens": 4, "background": True} | fields
    reply = stack.client.post(PATH, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def events_of(stack: Stack, run_id: str) -> list[Event]:
    """The stored events of a run."""
    with Redis.from_url(stack.embedded.url) as redis:
        rows: Any = redis.lrange(f"onebox:{{default}}:run:{run_id}:events", 0, -1)
    return [decode(row) for row in rows]


def positions(events: list[Event]) -> list[int]:
    return [event.position for event in events if isinstance(event, Queued)]


def cancel(stack: Stack, run_id: str) -> dict[str, Any]:
    return dict(stack.client.post(f"{PATH}/{run_id}/cancel").json())


def completed(stack: Stack, *runs: str) -> None:
    until(lambda: all(stack.client.get(f"{PATH}/{run}").json()["status"] != "in_progress" for run in runs))


def test_run_with_a_free_place_says_nothing_of_a_queue(few: Stack) -> None:
    run = start(few)["id"]
    completed(few, run)
    assert positions(events_of(few, run)) == []


def test_runs_beyond_the_places_are_told_where_they_stand_and_are_served_in_order(few: Stack, full: list[str]) -> None:
    waiting = [start(few)["id"] for _ in range(3)]
    until(lambda: [positions(events_of(few, run)) for run in waiting] == [[1], [2], [3]])
    assert few.client.get(f"{PATH}/{waiting[0]}").json()["status"] == "in_progress"
    cancel(few, full[0])
    completed(few, *waiting)
    logs = [events_of(few, run) for run in waiting]
    assert all(positions(log)[-1] == 0 for log in logs)
    for log in logs:
        kinds = [event.kind for event in log]
        assert kinds.index("text_delta") > max(at for at, kind in enumerate(kinds) if kind == "queued")
        assert isinstance(log[-1], Completed)


def test_streams_of_both_apis_carry_the_position_at_once(few: Stack, full: list[str]) -> None:
    ask = {"model": "chat", "max_output_tokens": 4, "stream": True, "input": "Tell me about the river."}
    with few.client.stream("POST", PATH, json=ask) as reply:
        assert reply.status_code == 200
        blocks = reply.iter_text()
        text = next(blocks)
        while "event: onebox.queued\n" not in text:
            text += next(blocks)
        assert '"event":{"position":1,' in text
    until(lambda: few.client.get("/metrics").text.find("onebox_admission_waiting 0.0") > 0)
    chat = {
        "model": "chat",
        "messages": [{"role": "user", "content": "Tell me about the river."}],
        "max_tokens": 4,
        "stream": True,
        "onebox": {"events": True},
    }
    with few.client.stream("POST", CHAT, json=chat) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: "))
        seen: list[dict[str, Any]] = []
        while not any(one.get("onebox", {}).get("event", {}).get("kind") == "queued" for one in seen):
            seen.append(json.loads(next(lines)[6:]))
        cancel(few, full[0])
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"


async def test_client_library_yields_the_position(few: Stack, full: list[str]) -> None:
    async with Client(few.url, ADMIN_KEY) as client:
        run = await client.start([user("Tell me about the river.")], model="chat", max_tokens=4)
        seen: list[Event] = []
        async for _, event in client.follow(run.run_id):
            seen.append(event)
            if isinstance(event, Queued) and event.position == 1:
                cancel(few, full[0])
    assert positions(seen)[0] == 1
    assert isinstance(seen[0], Accepted)
    assert isinstance(seen[-1], Completed)
    assert any(isinstance(event, TextDelta) for event in seen)


def test_client_that_leaves_leaves_the_queue(few: Stack, full: list[str]) -> None:
    ask = {"model": "chat", "max_output_tokens": 4, "stream": True, "input": "I shall leave."}
    with few.client.stream("POST", PATH, json=ask) as reply:
        told = reply.iter_text()
        next(told)
        behind = start(few)["id"]
        until(lambda: positions(events_of(few, behind)) == [2])
    until(lambda: positions(events_of(few, behind)) == [2, 1])
    cancel(few, behind)


def test_stop_works_in_the_queue_and_says_that_nothing_was_drawn(few: Stack, full: list[str]) -> None:
    run = start(few)["id"]
    until(lambda: positions(events_of(few, run)) == [1])
    began = time.monotonic()
    receipt = cancel(few, run)["onebox"]["event"]
    assert time.monotonic() - began < 5
    assert (receipt["kind"], receipt["tokens"]) == ("stopped", 0)
    assert isinstance(events_of(few, run)[-1], Stopped)


def test_single_run_of_another_tenant_passes_fifty(few: Stack, full: list[str]) -> None:
    key = few.new_key("b")
    crowd = [start(few)["id"] for _ in range(50)]
    body = {"model": "chat", "input": "One question.", "max_output_tokens": 4}
    answered: list[httpx.Response] = []

    def ask() -> None:
        headers = {"authorization": f"Bearer {key}"}
        answered.append(httpx.post(f"{few.url}{PATH}", json=body, headers=headers, timeout=30))

    until(lambda: positions(events_of(few, crowd[-1])) == [50])
    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: positions(events_of(few, crowd[-1])) == [50, 51])
    for run_id in full:
        cancel(few, run_id)
    asking.join()
    done = [run for run in crowd if few.client.get(f"{PATH}/{run}").json()["status"] == "incomplete"]
    assert answered[0].status_code == 200
    assert len(done) <= 10
    completed(few, *crowd)


def test_queued_run_of_a_killed_worker_queues_at_another_and_ends_well(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with run_stack(Stack(tmp_path, valkey, FEW)) as stack, ExitStack() as cleaning:
        blocking = [start(stack, max_output_tokens=LONG)["id"] for _ in range(2)]
        until(lambda: stack.engine_running() == 2)
        run = start(stack)["id"]
        until(lambda: positions(events_of(stack, run)) == [1])
        second = stack.worker(free_port())
        second.start()
        cleaning.callback(second.stop)
        stack.gateway.kill()
        stack.client.base_url = httpx.URL(f"http://127.0.0.1:{second.environment['ONEBOX_API_PORT']}")
        until(lambda: len(positions(events_of(stack, run))) == 2)  # it waits again, or its turn has come first
        for run_id in blocking:
            cancel(stack, run_id)
        completed(stack, run)
        log = events_of(stack, run)
        assert positions(log)[0] == 1
        assert positions(log)[-1] == 0
        assert isinstance(log[-1], Completed)
        assert stack.client.get(f"{PATH}/{run}").json()["output"][0]["content"][0]["text"]


def test_full_queue_is_a_clean_refusal_before_anything_is_read(valkey: EmbeddedStore, tmp_path: Path) -> None:
    limits = FEW | {"queue_per_place": "0.5"}
    with run_stack(Stack(tmp_path, valkey, limits)) as stack:
        for _ in range(2):
            start(stack, max_output_tokens=LONG)
        until(lambda: stack.engine_running() == 2)
        key = {"idempotency-key": "the one that waits"}
        waiting = start(stack, headers=key)["id"]
        until(lambda: positions(events_of(stack, waiting)) == [1])
        assert start(stack, headers=key)["id"] == waiting
        chat = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        for path, body in ((CHAT, chat), (PATH, {"input": "Hi"}), ("/v1/tasks/chat", {"text": "Hi"}), (CHAT, "junk")):
            refused = stack.client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
        refused = stack.client.post(PATH, json={"input": "Hi", "background": True}, headers={"idempotency-key": "new"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert stack.client.get("/v1/tasks").status_code == 200
        assert 'onebox_admission_refusals_total{limit="queue"} 6.0' in stack.client.get("/metrics").text
