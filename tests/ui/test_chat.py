import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from onebox.client import Client
from tests.ui.conftest import Fake
from ui.chat import Ask, Chat, Update
from ui.stream import Pace, Stops


@pytest.fixture
async def client(fake: Fake) -> AsyncIterator[Client]:
    async with Client(fake.url, "key") as client:
        yield client


@pytest.fixture
def stops() -> Stops:
    return Stops()


@pytest.fixture
def chat(client: Client, stops: Stops) -> Chat:
    return Chat(client, Pace(0.005, 0), stops, poll_s=0.02)


async def _all(chat: Chat, ask: Ask) -> list[Update]:
    return [update async for update in chat.answer("session", ask)]


def _reply(update: Update) -> str:
    assert update.conversation is not None
    return update.conversation.turns[-1].variants[-1].text


async def test_reply_grows_over_several_updates_and_ends_as_stored(chat: Chat, fake: Fake) -> None:
    updates = await _all(chat, Ask(None, "Hello"))
    texts = [_reply(update) for update in updates]
    assert len(set(texts)) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [update.running for update in updates].count(False) == 1
    stored = next(iter(fake.gateway.conversations.values()))
    assert texts[-1] == stored["turns"][0]["variants"][0]["text"]
    assert stored["title"] == "Hello"


async def test_reroute_adds_a_variant_of_the_same_turn(chat: Chat, fake: Fake) -> None:
    first = (await _all(chat, Ask(None, "Hello")))[-1].conversation
    assert first is not None
    last = (await _all(chat, Ask(first.id, model="qa", regenerate=True)))[-1].conversation
    assert last is not None
    assert [variant.task for variant in last.turns[0].variants] == ["translate", "qa"]


async def test_edit_replaces_the_turn_and_those_after_it(chat: Chat) -> None:
    first = (await _all(chat, Ask(None, "one")))[-1].conversation
    assert first is not None
    second = (await _all(chat, Ask(first.id, "two")))[-1].conversation
    assert second is not None
    edited = (await _all(chat, Ask(first.id, "uno", edit=second.turns[0].id)))[-1].conversation
    assert edited is not None
    assert [turn.user for turn in edited.turns] == ["uno"]


async def test_message_waits_for_a_loading_model_and_is_sent_once(chat: Chat, fake: Fake) -> None:
    fake.gateway.ready = False
    updates: list[Update] = []
    async for update in chat.answer("session", Ask(None, "Hello")):
        updates.append(update)
        fake.gateway.ready = fake.gateway.ready or update.waiting_s is not None
    assert any(update.waiting_s is not None for update in updates)
    assert updates[-1].conversation is not None
    assert [turn.user for turn in updates[-1].conversation.turns] == ["Hello"]
    assert updates[-1].conversation.turns[0].variants[-1].state == "completed"


async def test_message_waits_for_an_api_that_is_not_there_and_comes_back_when_stopped(stops: Stops) -> None:
    async with Client("http://127.0.0.1:1", "key") as nobody:
        chat = Chat(nobody, Pace(), stops, poll_s=0.02)
        updates: list[Update] = []
        async for update in chat.answer("session", Ask(None, "Hello")):
            updates.append(update)
            stops.stop("session")
    assert updates[0].waiting_s == 0
    assert updates[-1] == Update(None, running=False, unsent=True)


async def test_broken_reply_keeps_its_text_beside_the_error(chat: Chat, fake: Fake) -> None:
    fake.gateway.fail_at = 5
    conversation = (await _all(chat, Ask(None, "Hello")))[-1].conversation
    assert conversation is not None
    variant = conversation.turns[0].variants[0]
    assert variant.state == "failed"
    assert variant.text.startswith("**Hello** word1")
    assert variant.error is not None
    assert variant.error.code == "engine_failed"


async def test_stop_reaches_the_gateway_and_the_page_says_so(chat: Chat, fake: Fake, stops: Stops) -> None:
    fake.gateway.words, last = 10_000, None
    async for update in chat.answer("session", Ask(None, "Hello")):
        last = update
        if _reply(update):
            stops.stop("session")
    assert last is not None
    assert last.conversation is not None
    assert last.conversation.turns[0].variants[0].state == "stopped"
    await _until_idle(fake)


async def test_leaving_the_exchange_early_stops_the_gateway(chat: Chat, fake: Fake) -> None:
    fake.gateway.words = 10_000
    async with aclosing(chat.answer("session", Ask(None, "Hello"))) as updates:
        async for update in updates:
            if _reply(update):
                break
    await _until_idle(fake)


async def test_progress_is_shown_until_the_text_begins(chat: Chat, fake: Fake) -> None:
    fake.gateway.progress = 2
    updates = await _all(chat, Ask(None, "Hello"))
    assert {update.progress.done for update in updates if update.progress} <= {0, 1}
    assert any(update.progress and not _reply(update) for update in updates)
    assert updates[-1].progress is None


async def test_a_chat_that_is_gone_is_a_problem_and_the_message_goes_back_to_the_box(chat: Chat) -> None:
    updates = await _all(chat, Ask("nowhere", "Hello"))
    assert [update.problem.code for update in updates if update.problem] == ["conversation_not_found"]
    assert updates[-1].unsent


async def _until_idle(fake: Fake) -> None:
    async with asyncio.timeout(10):
        while fake.gateway.running:
            await asyncio.sleep(0.01)
