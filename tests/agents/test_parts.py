"""Parts of the gateway on their own: option probabilities, the first key, the shape of chunks."""

import math

import openai.types.chat
import pytest

from agents.conversations import Turn, Variant, history
from agents.keys import ensure_admin_key
from agents.llm import share
from agents.store import Store
from agents.wire import ChunkEncoder
from deploy.store import EmbeddedStore, prepare
from onebox.errors import StoreUnavailable
from onebox.events import Alternative, TextDelta, Token, Usage
from onebox.settings import Settings
from tests.agents.conftest import store_child


def test_history_too_long_for_any_engine_keeps_its_newest_turns() -> None:
    answered = [
        Turn(f"turn_{number}", f"{number}", 0.0, (Variant(f"resp_{number}", "x" * (100 * 1024), state="completed"),))
        for number in range(4)
    ]
    messages = history((*answered, Turn("turn_last", "last", 0.0, (Variant("resp_last"),))))
    assert [message.text for message in messages if message.role == "user"] == ["2", "3", "last"]


def token(text: str, identifier: int, probability: float, *rivals: tuple[str, int, float]) -> Token:
    top = tuple(Alternative(name, number, math.log(p)) for name, number, p in rivals)
    return Token(text, identifier, math.log(probability), top)


def test_option_shares_follow_the_rivals_of_the_first_token() -> None:
    tokens = [token("chat", 1, 0.6, ("chat", 1, 0.6), ("write", 2, 0.3), ("the", 3, 0.1))]
    shares = share(["chat", "write", "qa"], "chat", tokens)
    assert shares == pytest.approx({"chat": 2 / 3, "write": 1 / 3, "qa": 0.0})


def test_options_that_share_a_beginning_are_told_apart_where_they_part() -> None:
    tokens = [
        token("re", 1, 0.8, ("re", 1, 0.8), ("qa", 2, 0.2)),
        token("ason", 3, 0.75, ("ason", 3, 0.75), ("write", 4, 0.25)),
    ]
    shares = share(["reason", "rewrite", "qa"], "reason", tokens)
    assert shares == pytest.approx({"reason": 0.6, "rewrite": 0.2, "qa": 0.2})


def test_option_shares_without_logprobs_are_certain() -> None:
    assert share(["a", "b"], "b", []) == {"a": 0.0, "b": 1.0}


async def test_admin_key_is_made_once(valkey: EmbeddedStore) -> None:
    store = Store(Settings.model_validate({"redis_url": valkey.url}))
    try:
        await store.run("return redis.call('DEL', KEYS[1])", ["onebox:keys"], [])
        first = await ensure_admin_key(store)
        assert first is not None
        assert first.startswith("sk-onebox-")
        assert await ensure_admin_key(store) is None
    finally:
        await store.close()


async def test_store_that_does_not_exist_is_unavailable_not_slow() -> None:
    store = Store(Settings.model_validate({"redis_url": "redis://127.0.0.1:1/0"}))
    with pytest.raises(StoreUnavailable) as away:
        await store.ping()
    assert away.value.retry_after_s
    await store.close()


async def test_store_that_is_out_of_memory_is_unavailable(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tiny")
    embedded = prepare(folder)
    child = store_child(embedded, folder)
    child.start()
    store = Store(Settings.model_validate({"redis_url": embedded.url}))
    try:
        await store.transaction([("CONFIG", "SET", "maxmemory", "1")])
        with pytest.raises(StoreUnavailable):
            await ensure_admin_key(store)
        with pytest.raises(StoreUnavailable):
            await store.hash_set("a", "b", "c")
    finally:
        await store.close()
        child.stop()


def test_chunks_are_what_the_stock_client_parses() -> None:
    encoder = ChunkEncoder("run_1", 'a"b', 1)
    delta = TextDelta('say "雨"\n', (token("雨", 5, 0.5, ("雨", 5, 0.5)),))
    sent = [
        encoder.opening(b"{}"),
        encoder.text(TextDelta("x")),
        encoder.text(delta),
        encoder.finish("stop"),
        encoder.usage(Usage(1, 2)),
    ]
    chunks = [
        openai.types.chat.ChatCompletionChunk.model_validate_json(line.removeprefix(b"data: "), strict=True)
        for line in sent
    ]
    assert chunks[2].choices[0].delta.content == 'say "雨"\n'
    assert chunks[2].choices[0].logprobs is not None
    assert chunks[3].choices[0].finish_reason == "stop"
    assert chunks[4].usage is not None
    assert chunks[4].usage.total_tokens == 3
