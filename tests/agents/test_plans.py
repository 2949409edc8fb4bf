"""Plans of several steps: what each step is given, plans that a caller names, and plans changed while they run."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from agents.run_scripts import NEXT_STEP
from agents.run_store import RunStore
from agents.steps import replanned, request_of
from agents.store import Store
from agents.store_keys import RunKeys
from deploy.store import EmbeddedStore
from onebox.client import Client
from onebox.errors import Conflict
from onebox.events import Completed, Event, Replanned, Routed, Step, StepStarted, TextDelta, decode
from onebox.messages import user
from onebox.plans import replan, steps_of
from onebox.settings import Settings
from onebox.sockets import free_port
from tests.agents.processes import ADMIN_KEY, Child, Stack, run_stack, until

PATH = "/v1/responses"
TEXT = "The ferry to the northern islands will stop running in November. Repairs to the pier cost more than planned."
ASK = f"Summarise this, then translate it into French and finally write a tweet about it: {TEXT}"
SLOW = {"scripted_itl_ms": "12", "lease_s": "1.5", "lease_renew_s": "0.4"}


@pytest.fixture(scope="module")
def slow(valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An engine slow enough for a plan to be changed while its first step is at work."""
    with run_stack(Stack(tmp_path_factory.mktemp("plans"), valkey, SLOW)) as running:
        yield running


@pytest.fixture
def second(slow: Stack) -> Iterator[tuple[Child, str]]:
    """Another worker of the same store and engine."""
    port = free_port()
    child = slow.worker(port)
    child.start()
    yield child, f"http://127.0.0.1:{port}"
    child.stop()


def start(stack: Stack, text: str = ASK, **onebox: object) -> str:
    body: dict[str, Any] = {"model": "auto", "input": text, "background": True, "onebox": onebox}
    reply = stack.client.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def refused(stack: Stack, **body: object) -> str:
    reply = stack.client.post(PATH, json={"input": ASK, **body})
    assert reply.status_code == 400
    return str(reply.json()["error"]["message"])


def log_of(stack: Stack, run_id: str) -> list[Event]:
    with Redis.from_url(stack.embedded.url) as redis:
        rows: Any = redis.lrange(f"onebox:{{default}}:run:{run_id}:events", 0, -1)
    return [decode(row) for row in rows]


def finished(stack: Stack, run_id: str) -> list[Event]:
    until(lambda: isinstance(log_of(stack, run_id)[-1], Completed), 60)
    return log_of(stack, run_id)


def begun(events: list[Event]) -> list[str]:
    return [event.task for event in events if isinstance(event, StepStarted)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def steps(message: str, *spans: tuple[str, str]) -> list[Step]:
    found = []
    for index, (task, words) in enumerate(spans):
        at = message.index(words)
        found.append(Step(task, "previous" if index else "message", words, at, at + len(words)))
    return found


def test_first_step_gets_the_message_without_the_words_of_the_others() -> None:
    message = f"Summarise this and put it into French: {TEXT}"
    plan = steps(message, ("summarize", "Summarise this"), ("translate", " and put it into French"))
    assert request_of(plan, 0, message, "") == f"Summarise this: {TEXT}"
    assert request_of(plan, 1, message, "Short.") == " and put it into French\n\nShort."


def test_step_without_words_of_its_own_gets_the_whole_instruction() -> None:
    message = f"Summarise this: {TEXT}"
    plan = [Step("summarize", "message"), Step("translate", "previous")]
    assert request_of(plan, 0, message, "") == message
    assert request_of(plan, 1, message, "Short.") == "Summarise this:\n\nShort."


def test_changed_plan_keeps_the_words_of_its_steps_and_what_has_begun() -> None:
    plan = [
        Step("summarize", "message", "sum up"),
        Step("translate", "previous", "in French"),
        Step("write", "previous"),
    ]
    changed = replanned(plan, 1, ["summarize", "write", "translate"])
    assert changed is not None
    assert [(step.task, step.words) for step in changed] == [
        ("summarize", "sum up"), ("write", ""), ("translate", "in French"),
    ]  # fmt: skip
    assert replanned(plan, 1, ["summarize", "translate", "write"]) is None, "it is this plan"
    assert replanned(plan, 1, ["translate", "summarize"]) is None, "the first step has begun"
    routed = Routed("summarize", ("summarize", "translate", "write"), {}, "head", 1.0, steps=tuple(plan))
    assert [step.task for step in steps_of(replan(routed, Replanned(1, ("summarize",))))] == ["summarize"]


def test_message_of_three_steps_is_carried_out_in_order_and_shows_its_steps(slow: Stack) -> None:
    route = slow.client.post("/v1/route", json={"text": ASK}).json()
    assert route["plan"] == ["summarize", "translate", "write"]
    assert [step["input"] for step in route["steps"]] == ["message", "previous", "previous"]
    for step in route["steps"]:
        assert step["words"] in ASK[step["start"] : step["end"]]
    assert "French" in route["steps"][1]["words"]


def test_plan_of_the_callers_own_is_carried_out(slow: Stack) -> None:
    events = finished(slow, start(slow, f"What is it about? {TEXT}", plan=["translate", "qa"]))
    assert begun(events) == ["translate", "qa"]
    assert next(event for event in events if isinstance(event, Routed)).tier == "explicit"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"onebox": {"plan": ["translate", "dance"]}}, "'dance'"),
        ({"onebox": {"plan": ["qa"] * 4}}, "1 to 3 steps"),
        ({"model": "qa", "onebox": {"plan": ["qa", "translate"]}}, "'auto'"),
        ({"onebox": {"plan": ["translate", "qa"], "params": {"colour": "red"}}}, "'colour'"),
    ],
)
def test_plan_that_cannot_be_carried_out_is_refused(slow: Stack, body: dict[str, object], said: str) -> None:
    assert said in refused(slow, **body)


async def test_steps_that_have_not_begun_can_be_changed(slow: Stack) -> None:
    run = start(slow)
    until(lambda: begun(log_of(slow, run)) == ["summarize"])
    async with Client(slow.url, ADMIN_KEY) as client:
        with pytest.raises(Conflict, match="have begun"):
            await client.replan(run, ["translate", "write"])
        await client.replan(run, ["summarize", "write"])
        events = finished(slow, run)
        assert [event for event in events if isinstance(event, Replanned)] == [Replanned(1, ("summarize", "write"))]
        assert begun(events) == ["summarize", "write"]
        assert text_of(events)
        with pytest.raises(Conflict, match="last step has begun"):
            await client.replan(run, ["summarize"])
    assert slow.client.get(f"{PATH}/{run}").json()["onebox"]["route"]["plan"] == ["summarize", "write"]


def test_run_whose_later_steps_are_taken_away_answers_with_what_it_has(slow: Stack) -> None:
    run = start(slow)
    until(lambda: begun(log_of(slow, run)) == ["summarize"])
    assert slow.client.put(f"{PATH}/{run}/plan", json={"plan": ["summarize"]}).json() == {
        "id": run,
        "plan": ["summarize"],
    }
    events = finished(slow, run)
    assert begun(events) == ["summarize"]
    assert text_of(events).strip()


async def test_worker_that_takes_over_goes_on_with_the_changed_plan(slow: Stack, second: tuple[Child, str]) -> None:
    child, url = second
    async with Client(url, ADMIN_KEY) as client:
        run = (await client.start([user(ASK)])).run_id
        until(lambda: begun(log_of(slow, run)) == ["summarize"])
        await client.replan(run, ["summarize", "translate"])
    until(lambda: begun(log_of(slow, run)) == ["summarize", "translate"])
    until(lambda: bool(text_of(log_of(slow, run))))
    assert child.process is not None
    os.kill(child.process.pid, signal.SIGKILL)
    events = finished(slow, run)
    assert begun(events) == ["summarize", "translate"]
    assert sum(isinstance(event, Replanned) for event in events) == 1


async def test_plan_that_comes_as_the_next_step_begins_is_refused(slow: Stack) -> None:
    store = Store(Settings.model_validate({"redis_url": slow.embedded.url}))
    runs, key = RunStore(store, "worker", 10.0, 60), RunKeys("default", "a-run").run
    with Redis.from_url(slow.embedded.url) as redis:
        redis.hset(key, "state", "running")
    try:
        assert await runs.replan("default", "a-run", ["qa", "write"], 1) == "kept"
        assert await store.run(NEXT_STEP, [key], [2]) == b"qa,write"
        assert await runs.replan("default", "a-run", ["qa"], 1) == "begun"
        assert await runs.replan("default", "a-run", ["qa", "write", "translate"], 2) == "kept"
        with Redis.from_url(slow.embedded.url) as redis:
            redis.hset(key, "state", "completed")
        assert await store.run(NEXT_STEP, [key], [3]) is None
        assert await runs.replan("default", "a-run", ["qa", "write"], 2) == "ended"
    finally:
        await store.close()


async def test_first_step_cannot_be_changed_once_it_is_decided(slow: Stack) -> None:
    run = start(slow, plan=["summarize", "write"])
    until(lambda: any(isinstance(event, Routed) for event in log_of(slow, run)))
    async with Client(slow.url, ADMIN_KEY) as client:
        with pytest.raises(Conflict, match="have begun"):
            await client.replan(run, ["translate", "write"])
    assert begun(finished(slow, run)) == ["summarize", "write"]
