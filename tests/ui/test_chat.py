import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from onebox.client import Client
from tests.ui.conftest import Fake
from ui.chat import Ask, Chat
from ui.reply import Update
from ui.stream import Pace, Seats


@pytest.fixture
async def client(fake: Fake) -> AsyncIterator[Client]:
    async with Client(fake.url, "key") as client:
        yield client


@pytest.fixture
def chat(client: Client) -> Chat:
    return Chat(client, Pace(0.005, 0), Seats(), poll_s=0.02)


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


async def test_message_waits_for_an_api_that_is_not_there_and_comes_back_when_stopped() -> None:
    async with Client("http://127.0.0.1:1", "key") as nobody:
        chat = Chat(nobody, Pace(), Seats(), poll_s=0.02)
        updates: list[Update] = []
        async for update in chat.answer("session", Ask(None, "Hello")):
            updates.append(update)
            await chat.stop("session", None)
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


async def test_stop_ends_the_run_and_the_page_shows_its_receipt(chat: Chat, fake: Fake) -> None:
    fake.gateway.words, last, stopped = 10_000, None, False
    async for update in chat.answer("session", Ask(None, "Hello")):
        last = update
        if _reply(update) and not stopped:
            stopped = True
            await chat.stop("session", None)
    assert last is not None
    assert last.conversation is not None
    (variant,) = last.conversation.turns[0].variants
    assert variant.state == "stopped"
    assert variant.receipt is not None
    assert variant.receipt.tokens == len(_reply(last).split())
    assert not fake.gateway.running


async def test_a_session_that_only_looks_at_a_conversation_stops_its_reply_too(chat: Chat, fake: Fake) -> None:
    fake.gateway.words, last, stopped = 10_000, None, False
    async for update in chat.answer("one", Ask(None, "Hello")):
        last = update
        if _reply(update) and not stopped:
            stopped = True
            assert update.conversation is not None
            await chat.stop("another", update.conversation.id)
    assert last is not None
    assert last.conversation is not None
    assert last.conversation.turns[0].variants[0].receipt is not None


async def test_leaving_the_exchange_early_leaves_the_reply_running(chat: Chat, fake: Fake) -> None:
    fake.gateway.words = 100
    async with aclosing(chat.answer("session", Ask(None, "Hello"))) as updates:
        async for update in updates:
            if _reply(update):
                break
    assert fake.gateway.running == 1
    await _until_idle(fake)
    (stored,) = fake.gateway.conversations.values()
    assert stored["turns"][0]["variants"][0]["state"] == "completed"


async def test_who_comes_later_sees_the_whole_reply_grow_and_both_see_the_same(chat: Chat, fake: Fake) -> None:
    fake.gateway.words = 200
    views: list[list[str]] = []

    async def watch(session: str, conversation: str) -> None:
        views.append([_reply(update) async for update in chat.watch(session, conversation)])

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        begun = False
        async for update in chat.answer("first", Ask(None, "Hello")):
            if len(_reply(update)) > 200 and not begun:
                begun = True
                assert update.conversation is not None
                for number in range(2):
                    group.create_task(watch(f"later{number}", update.conversation.id))
    (stored,) = fake.gateway.conversations.values()
    text = stored["turns"][0]["variants"][0]["text"]
    assert [view[-1] for view in views] == [text, text]
    for view in views:
        assert len(view[0]) > 200
        assert len(set(view)) > 3
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(view))


async def test_message_whose_answer_was_lost_is_sent_again_and_answered_once(chat: Chat, fake: Fake) -> None:
    fake.gateway.lost_answers = 5
    updates = await _all(chat, Ask(None, "Hello"))
    (stored,) = fake.gateway.conversations.values()
    assert [turn["user"] for turn in stored["turns"]] == ["Hello"]
    assert len(fake.gateway.runs) == 1
    assert all(len(update.conversation.turns) == 1 for update in updates if update.conversation)
    assert _reply(updates[-1]) == stored["turns"][0]["variants"][0]["text"]


async def test_message_sent_into_a_conversation_that_is_busy_goes_back_to_the_box(chat: Chat, fake: Fake) -> None:
    fake.gateway.words, refused = 10_000, list[Update]()
    async for update in chat.answer("one", Ask(None, "Hello")):
        if _reply(update) and not refused:
            assert update.conversation is not None
            refused = [update async for update in chat.answer("two", Ask(update.conversation.id, "And I?"))]
            await chat.stop("one", None)
    assert refused[-1].problem is not None
    assert refused[-1].problem.code == "conflict"
    assert refused[-1].unsent


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


async def test_place_in_the_queue_is_shown_until_the_turn_has_come(chat: Chat, fake: Fake) -> None:
    fake.gateway.queued = 2
    updates = await _all(chat, Ask(None, "Hello"))
    shown = [update.queued.position for update in updates if update.queued]
    assert list(dict.fromkeys(shown)) == [2, 1]
    assert not any(update.queued for update in updates if _reply(update))
    assert updates[-1].queued is None
    assert _reply(updates[-1])
