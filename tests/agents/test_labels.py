"""Corrections through the API: where they become labels, who sees them, and how they are undone."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from redis import Redis

from agents.label_feed import NOT_YET, SWITCHED_OFF
from agents.store_keys import LabelKeys
from deploy.store import EmbeddedStore
from onebox.client import Client
from onebox.errors import Conflict, NotFound
from onebox.messages import assistant, user
from onebox.sockets import free_port
from tests.agents.processes import Stack, run_stack, until

TEXT = "The ferry to the northern islands will stop running in November. Repairs to the pier cost more than planned."
ASK = f"Summarise this, then translate it into French and finally write a tweet about it: {TEXT}"
SLOW = {"scripted_itl_ms": "12"}


class Tenant:
    """A tenant of the stack's gateway that learns from its corrections."""

    opened: ClassVar[list[httpx.Client]] = []

    def __init__(self, stack: Stack, name: str, learning: str | None = "tenant") -> None:
        headers = {"authorization": f"Bearer {stack.new_key(name)}"}
        self.name, self.key = name, headers["authorization"].split()[1]
        self.http = httpx.Client(base_url=stack.url, headers=headers, timeout=30.0, trust_env=False)
        self.opened.append(self.http)
        if learning is not None:
            assert self.http.put("/v1/labels/learning", json={"learning": learning}).status_code == 200

    def say(self, text: str, **onebox: object) -> str:
        """A first message in a new conversation; the conversation."""
        conversation = str(self.http.post("/v1/conversations", json={}).json()["id"])
        self.answer(conversation, text, "auto", **onebox)
        return conversation

    def again(self, conversation: str, model: str = "auto", **onebox: object) -> str:
        """The last turn answered again; the run."""
        return self.answer(conversation, "", model, regenerate=True, **onebox)

    def answer(self, conversation: str, text: str, model: str, **onebox: object) -> str:
        messages = [{"role": "user", "content": text}] if text else []
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": 4,
            "onebox": {"conversation": conversation, **onebox},
        }
        reply = self.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["id"])

    def decided(self, conversation: str) -> list[str]:
        """What the router had decided at first."""
        return list(self.variants(conversation)[0]["route"]["plan"])  # type: ignore[index]

    def variants(self, conversation: str) -> list[dict[str, object]]:
        return list(self.http.get(f"/v1/conversations/{conversation}").json()["turns"][-1]["variants"])

    def rate(self, conversation: str, run_id: str, value: str | None) -> None:
        body = {"conversation": conversation, "run_id": run_id, "value": value}
        assert self.http.post("/v1/feedback", json=body).status_code == 200

    def labels(self) -> list[dict[str, object]]:
        return list(self.http.get("/v1/labels").json()["data"])

    def noted(self) -> list[tuple[object, object]]:
        return [(one["source"], one["plan"]) for one in self.labels()]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No connection outlives its test, and no later worker of this store learns what was taught in it."""
    yield
    while Tenant.opened:
        http = Tenant.opened.pop()
        if not http.is_closed:
            http.put("/v1/labels/learning", json={"learning": "off"})
            http.close()


@pytest.fixture
def tenant(stack: Stack, request: pytest.FixtureRequest) -> Tenant:
    return Tenant(stack, f"labels-{request.node.name}")


@pytest.fixture
def second(stack: Stack) -> Iterator[str]:
    """The address of another worker of the same store and engine."""
    port = free_port()
    child = stack.worker(port)
    child.start()
    yield f"http://127.0.0.1:{port}"
    child.stop()


def other_than(task: str) -> str:
    return "write" if task != "write" else "qa"


def test_rerouting_a_turn_labels_its_message_until_it_is_routed_back(tenant: Tenant) -> None:
    conversation = tenant.say("Why is the sky blue?")
    (was,) = tenant.decided(conversation)
    tenant.again(conversation, was)
    run = tenant.again(conversation, "write")
    until(lambda: tenant.noted() == [("reroute", ["write"])])
    (made,) = tenant.labels()
    assert made["was"] == [was]
    assert made["run_id"] == run
    assert made["scope"] == "tenant"
    assert made["messages"] == [{"role": "user", "content": "Why is the sky blue?"}]
    tenant.again(conversation, "reason")
    until(lambda: tenant.noted() == [("reroute", ["reason"])])
    tenant.again(conversation, was)
    until(lambda: tenant.noted() == [])


def test_label_of_a_later_turn_has_the_history_that_the_router_saw(tenant: Tenant) -> None:
    conversation = tenant.say("Name a river.")
    tenant.answer(conversation, "And now a shorter one", "auto")
    tenant.again(conversation, other_than(tenant.decided(conversation)[0]))
    until(lambda: len(tenant.labels()) == 1)
    messages = tenant.labels()[0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]  # type: ignore[attr-defined]
    assert messages[-1]["content"] == "And now a shorter one"  # type: ignore[index]


def test_turn_answered_again_with_a_plan_is_labelled_with_it(tenant: Tenant) -> None:
    conversation = tenant.say(f"What is it about? {TEXT}")
    tenant.again(conversation, plan=["translate", "write"])
    until(lambda: tenant.noted() == [("plan", ["translate", "write"])])


def test_choice_made_with_the_message_itself_is_no_correction(tenant: Tenant) -> None:
    conversation = tenant.http.post("/v1/conversations", json={}).json()["id"]
    tenant.answer(conversation, "Why is the sky blue?", "write")
    tenant.again(conversation, "qa")
    tenant.again(conversation)
    tenant.again(conversation, "reason")
    until(lambda: tenant.noted() == [("reroute", ["reason"])])
    decided = tenant.variants(conversation)[2]["route"]["plan"]  # type: ignore[index]
    assert tenant.labels()[0]["was"] == decided


def test_nothing_is_noted_of_a_tenant_that_has_not_chosen_to_learn(stack: Stack, valkey: EmbeddedStore) -> None:
    silent = Tenant(stack, "labels-silent", learning=None)
    assert silent.http.get("/v1/labels/learning").json() == {"learning": "off"}
    unseen = silent.say("Why is the sky blue?")
    silent.rate(unseen, silent.again(unseen, other_than(silent.decided(unseen)[0])), "like")
    refused = silent.http.post("/v1/labels", json={"messages": [{"role": "user", "content": "Hello"}], "task": "chat"})
    assert refused.status_code == 409
    assert "Learning is off" in refused.json()["error"]["message"]
    assert silent.http.put("/v1/labels/learning", json={"learning": "tenant"}).status_code == 200
    seen = silent.say("Why is the grass green?")
    silent.again(seen, other_than(silent.decided(seen)[0]))
    until(lambda: silent.labels() != [])  # what was done before this has been looked at
    assert [made["messages"] for made in silent.labels()] == [[{"role": "user", "content": "Why is the grass green?"}]]
    with Redis.from_url(valkey.url) as store:
        assert store.hlen(LabelKeys("labels-silent").labels) == 1


def test_like_of_a_chosen_answer_is_a_label_until_it_is_taken_back(stack: Stack) -> None:
    liker = Tenant(stack, "labels-liker", learning=None)
    conversation = liker.say("Why is the sky blue?")
    task = other_than(liker.decided(conversation)[0])
    chosen = liker.again(conversation, task)
    first = str(liker.variants(conversation)[0]["run_id"])
    assert liker.http.put("/v1/labels/learning", json={"learning": "tenant"}).status_code == 200
    liker.rate(conversation, first, "like")
    for undo in (None, "dislike"):
        liker.rate(conversation, chosen, "like")
        until(lambda: liker.noted() == [("variant", [task])])
        assert liker.labels()[0]["run_id"] == chosen
        liker.rate(conversation, chosen, undo)
        until(lambda: liker.noted() == [])


def test_like_leaves_the_label_of_a_reroute_as_it_is(tenant: Tenant) -> None:
    conversation = tenant.say("Why is the sky blue?")
    task = other_than(tenant.decided(conversation)[0])
    run = tenant.again(conversation, task)
    until(lambda: tenant.noted() == [("reroute", [task])])
    tenant.rate(conversation, run, "like")
    other = tenant.say("Why is the grass green?")
    tenant.again(other, other_than(tenant.decided(other)[0]))
    until(lambda: len(tenant.labels()) == 2)  # what was done before this has been looked at
    assert [source for source, _ in tenant.noted()] == ["reroute", "reroute"]


def test_changed_plan_of_a_run_is_a_label(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with run_stack(Stack(tmp_path, valkey, SLOW)) as slow:
        planner = Tenant(slow, "labels-planner")
        body = {"model": "auto", "input": ASK, "background": True}
        run = planner.http.post("/v1/responses", json=body).json()["id"]

        def change() -> bool:
            plan = {"plan": ["summarize", "write"]}
            return planner.http.put(f"/v1/responses/{run}/plan", json=plan).status_code == 200

        until(change)
        until(lambda: planner.noted() == [("plan", ["summarize", "write"])])
        (made,) = planner.labels()
        assert made["was"] == ["summarize", "translate", "write"]
        assert made["run_id"] == run
        planner.http.post(f"/v1/responses/{run}/cancel")
        planner.http.close()


def test_unknown_task_of_a_label_is_refused_by_the_name_of_its_field(tenant: Tenant) -> None:
    for field, value in (("task", "dance"), ("plan", ["dance"])):
        body = {"messages": [{"role": "user", "content": "Hello"}], field: value}
        assert tenant.http.post("/v1/labels", json=body).json()["error"]["param"] == field


async def test_app_adds_lists_exports_and_undoes_labels(stack: Stack) -> None:
    name = "labels-app"
    async with Client(stack.url, stack.new_key(name)) as client:
        with pytest.raises(Conflict, match="Learning is off"):
            await client.labels.add([user("Hello")], ["chat"])
        await client.labels.set_learning("tenant")
        assert await client.labels.learning() == "tenant"
        made = await client.labels.add([user("Bonjour, comment ça va aujourd'hui ?")], ["chat"])
        assert not made.used
        await client.labels.add(
            [user("Salut"), assistant("Bonjour"), user("请先总结再翻译")], ["summarize", "translate"]
        )
        with pytest.raises(Conflict, match="itself alone"):
            await client.labels.add([user("Hello")], ["chat"], scope="global")
        page = await client.labels.page(limit=1)
        assert page.data[0].label.plan == ("summarize", "translate")
        assert page.next is not None
        assert (await client.labels.page(limit=1, cursor=page.next)).data[0].label.id == made.label.id
        lines = [json.loads(line) for line in (await client.labels.export()).splitlines()]
        assert [line["lang"] for line in lines] == ["fr", "zh"]
        assert [set(line) for line in lines] == [
            {"id", "messages", "task", "lang"}, {"id", "messages", "plan", "lang"},
        ]  # fmt: skip
        assert lines[0]["task"] == "chat"
        assert lines[1]["messages"][1] == {"role": "assistant", "content": "Bonjour"}
        await client.labels.undo(made.label.id)
        with pytest.raises(NotFound, match=made.label.id):
            await client.labels.undo(made.label.id)
        assert [row.label.plan for row in (await client.labels.page()).data] == [("summarize", "translate")]


async def test_corrected_message_is_decided_so_by_every_worker_for_its_tenant_alone(stack: Stack, second: str) -> None:
    text = "The sea was calm and the gulls were silent."
    key, other = stack.new_key("labels-taught"), stack.new_key("labels-untaught")
    async with Client(stack.url, key) as one, Client(second, key) as two, Client(second, other) as stranger:
        before = (await two.route(text)).task
        right = other_than(before)
        await one.labels.set_learning("tenant")
        made = await one.labels.add([user(text)], [right])
        async with asyncio.timeout(30):
            for client in (one, two):
                while (await client.route(text)).task != right:
                    await asyncio.sleep(0.02)
        assert (await two.labels.page()).data[0].used
        assert (await stranger.route(text)).task == before
        await one.labels.undo(made.label.id)
        async with asyncio.timeout(30):
            while (await two.route(text)).task != before:
                await asyncio.sleep(0.02)


async def test_label_is_known_to_every_worker(stack: Stack, second: str) -> None:
    key = stack.new_key("labels-everywhere")
    async with Client(stack.url, key) as one, Client(second, key) as two:
        await one.labels.set_learning("tenant")
        await one.labels.add([user("What do you make of this?")], ["reason"])
        async with asyncio.timeout(30):
            for client in (one, two):
                while (await client.labels.page()).data[0].reason == NOT_YET:
                    await asyncio.sleep(0.02)
        await one.labels.set_learning("off")
        async with asyncio.timeout(30):
            while (await two.labels.page()).data[0].reason != SWITCHED_OFF:
                await asyncio.sleep(0.02)


def test_nobody_sees_or_undoes_the_labels_of_another_tenant(stack: Stack, tenant: Tenant) -> None:
    body = {"messages": [{"role": "user", "content": "A secret of mine"}], "task": "chat"}
    made = tenant.http.post("/v1/labels", json=body).json()
    assert made["source"] == "api"
    assert stack.client.delete(f"/v1/labels/{made['id']}").status_code == 404
    assert "secret" not in stack.client.get("/v1/labels").text
    assert "secret" not in stack.client.get("/v1/labels/export").text
    assert len(tenant.labels()) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"task": "dance"}, "'dance'"),
        ({"plan": ["qa"] * 4}, "1 to 3 steps"),
        ({}, "exactly one of task and plan"),
        ({"task": "qa", "plan": ["qa"]}, "exactly one of task and plan"),
        ({"task": "qa", "scope": "all"}, "scope"),
        ({"task": "qa", "messages": [{"role": "assistant", "content": "Hm"}]}, "must be the user's"),
    ],
)
def test_label_that_says_nothing_usable_is_refused(tenant: Tenant, body: dict[str, object], said: str) -> None:
    reply = tenant.http.post("/v1/labels", json={"messages": [{"role": "user", "content": "Hello"}], **body})
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_unusable_cursors_ids_and_modes_are_refused(tenant: Tenant) -> None:
    assert tenant.http.get("/v1/labels", params={"cursor": "nonsense"}).status_code == 400
    assert tenant.http.delete("/v1/labels/label_nonsense").status_code == 404
    assert tenant.http.put("/v1/labels/learning", json={"learning": "sometimes"}).status_code == 400
