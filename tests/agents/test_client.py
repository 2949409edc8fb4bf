"""The public client's durable runs, over connections that break."""

import itertools
from contextlib import aclosing

import httpx
import pytest

from onebox.client import Client
from onebox.errors import Conflict, UnknownRun
from onebox.events import Accepted, Completed, Event, Stopped, TextDelta
from onebox.messages import user
from tests.agents.processes import ADMIN_KEY, Stack
from tests.agents.relay import run_relay

ASK = [user("Tell me about the river.")]


async def followed(client: Client, run_id: str, after: int = -1) -> list[tuple[int, Event]]:
    async with aclosing(client.follow(run_id, after)) as events:
        return [item async for item in events]


async def test_run_is_started_followed_and_followed_again(stack: Stack) -> None:
    conversation = stack.new_conversation()
    async with Client(stack.url, ADMIN_KEY) as client:
        run = await client.start(ASK, model="chat", conversation=conversation, max_tokens=20)
        told = await followed(client, run.run_id)
        assert run.status == "in_progress"
        assert told[0] == (0, Accepted(run.run_id, conversation, run.turn))
        assert [number for number, _ in told] == list(range(len(told)))
        assert told[-1][1] == Completed("length")
        assert await followed(client, run.run_id, 4) == told[5:]
        assert await followed(client, run.run_id, told[-1][0]) == []
    text = "".join(event.text for _, event in told if isinstance(event, TextDelta))
    assert [variant["text"] for variant in stack.variants(conversation)] == [text]


@pytest.mark.parametrize("size", [200, 900, 2500])
async def test_follower_whose_connections_break_misses_nothing_and_sees_nothing_twice(stack: Stack, size: int) -> None:
    async with Client(stack.url, ADMIN_KEY) as client:
        run = await client.start(ASK, model="chat", max_tokens=60)
        whole = await followed(client, run.run_id)
    # Each connection gets further than the one before, as a cut inside one long event would come again for ever.
    async with (
        run_relay(stack.url, iter(range(size, 100 * size, size))) as relay,
        Client(relay.url, ADMIN_KEY) as client,
    ):
        assert await followed(client, run.run_id) == whole
        assert relay.connections > 2


async def test_start_whose_answer_is_lost_makes_one_run(stack: Stack) -> None:
    conversation = stack.new_conversation()
    async with (
        run_relay(stack.url, itertools.chain([1, 40], itertools.repeat(None))) as relay,
        Client(relay.url, ADMIN_KEY) as client,
    ):
        run = await client.start(ASK, model="chat", conversation=conversation, max_tokens=8)
        assert relay.connections == 3
        await followed(client, run.run_id)
    assert [variant["run_id"] for variant in stack.variants(conversation)] == [run.run_id]


async def test_cancel_gives_the_receipt_to_everybody(stack: Stack) -> None:
    async with Client(stack.url, ADMIN_KEY) as client:
        run = await client.start(ASK, model="chat", max_tokens=2000)
        async with aclosing(client.follow(run.run_id)) as events:
            async for _, event in events:
                if isinstance(event, TextDelta):
                    break
        receipt = await client.cancel(run.run_id)
        assert isinstance(receipt, Stopped)
        assert receipt.tokens > 0
        assert await client.cancel(run.run_id) == receipt
        assert (await followed(client, run.run_id))[-1][1] == receipt


async def test_errors_that_waiting_does_not_cure_are_raised_at_once(stack: Stack) -> None:
    conversation = stack.new_conversation()
    async with Client(stack.url, ADMIN_KEY) as client:
        with pytest.raises(UnknownRun):
            await followed(client, "resp_00")
        with pytest.raises(UnknownRun):
            await client.cancel("resp_00")
        run = await client.start(ASK, model="chat", conversation=conversation, max_tokens=2000)
        with pytest.raises(Conflict):
            await client.start(ASK, model="chat", conversation=conversation)
        await client.cancel(run.run_id)


async def test_follower_outlives_a_restart_of_the_gateway(own_stack: Stack) -> None:
    async with Client(own_stack.url, ADMIN_KEY) as client:
        run = await client.start(ASK, model="chat", max_tokens=300)
        told: list[tuple[int, Event]] = []
        async with aclosing(client.follow(run.run_id)) as events:
            async for number, event in events:
                told.append((number, event))
                if len(told) == 12:
                    own_stack.gateway.kill()
                    own_stack.gateway.start()
        assert [number for number, _ in told] == list(range(len(told)))
        assert isinstance(told[-1][1], Completed)
        assert told == await followed(client, run.run_id)
    again = own_stack.client.get(f"/v1/responses/{run.run_id}").json()
    assert again["output"][0]["content"][0]["text"] == "".join(
        event.text for _, event in told if isinstance(event, TextDelta)
    )
    assert httpx.get(f"{own_stack.url}/healthz", trust_env=False).status_code == 200
