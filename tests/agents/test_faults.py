"""What users meet when the engine, the store or a worker dies: a clear error, and nothing lost."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.store import EmbeddedStore, prepare
from tests.agents.conftest import store_child
from tests.agents.processes import Stack, run_stack, until

PATH = "/v1/chat/completions"


@pytest.fixture
def fragile(valkey: EmbeddedStore, tmp_path: Path) -> Iterator[Stack]:
    """A stack of its own, whose parts may be killed."""
    with run_stack(Stack(tmp_path, valkey, {"engine_patience_s": "3"})) as running:
        yield running


def long_reply(conversation: str, tokens: int = 4000) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "Write on"}],
        "model": "chat",
        "max_tokens": tokens,
        "stream": True,
        "onebox": {"conversation": conversation},
    }


def contents(lines: list[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(x["delta"].get("content", "") for c in chunks for x in c.get("choices", ()))


def read_and_kill(stack: Stack, body: dict[str, object], seen: list[str], after_lines: int) -> None:
    """Reads a stream whose gateway dies after some lines."""
    with stack.client.stream("POST", PATH, json=body) as reply:
        for line in reply.iter_lines():
            seen.append(line)
            if len(seen) == after_lines:
                stack.gateway.kill()


def test_engine_killed_mid_reply_ends_the_stream_with_an_error_and_keeps_the_partial_reply(fragile: Stack) -> None:
    conversation = fragile.new_conversation()
    seen: list[str] = []
    with fragile.client.stream("POST", PATH, json=long_reply(conversation)) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            seen.append(line)
            if len(seen) == 20:
                fragile.engine.kill()
    told = [line for line in seen if line]
    assert json.loads(told[-1].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert "data: [DONE]" not in told
    (variant,) = fragile.variants(conversation)
    assert variant["state"] == "failed"
    assert variant["text"] == contents(told)
    assert variant["text"]
    fragile.engine.start()
    again = fragile.client.post(
        PATH, json={"messages": [], "max_tokens": 5, "onebox": {"conversation": conversation, "regenerate": True}}
    )
    assert again.status_code == 200


def test_engine_that_fails_at_a_token_is_told_as_an_error_event(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with run_stack(Stack(tmp_path, valkey, faults=("--fail-at-token", "12"))) as stack:
        conversation = stack.new_conversation()
        told = [line for line in stack.client.post(PATH, json=long_reply(conversation)).text.split("\n\n") if line]
        assert json.loads(told[-1].removeprefix("data: "))["error"]["retryable"] is True
        assert stack.variants(conversation)[0]["text"] == contents(told)
        assert stack.variants(conversation)[0]["text"]


def test_engine_that_never_was_there_is_told_as_a_loading_model(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with run_stack(Stack(tmp_path, valkey), engine=False) as stack:
        refused = stack.client.post(PATH, json={"messages": [{"role": "user", "content": "hi"}], "stream": True})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "model_loading"
        assert int(refused.headers["retry-after"]) >= 1
        ready = stack.client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["engine"] == "loading"
        assert ready.headers["retry-after"]
        assert stack.client.get("/healthz").status_code == 200
        assert stack.client.get("/v1/models").json()["data"][0]["id"] == "auto"
        stack.engine.start()
        assert stack.client.get("/readyz").status_code == 200


def test_engine_that_died_is_unavailable_and_its_return_is_noticed(fragile: Stack) -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}], "model": "chat", "max_tokens": 3}
    assert fragile.client.post(PATH, json=ask).status_code == 200
    fragile.engine.kill()
    refused = fragile.client.post(PATH, json=ask)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "unavailable"
    assert fragile.client.get("/readyz").json()["engine"] == "down"
    fragile.engine.start()
    assert fragile.client.post(PATH, json=ask).status_code == 200


def test_store_that_is_away_answers_503_and_its_return_is_noticed(tmp_path: Path) -> None:
    embedded = prepare(tmp_path / "store")
    store = store_child(embedded, tmp_path)
    store.start()
    try:
        with run_stack(Stack(tmp_path, embedded)) as stack:
            conversation = stack.new_conversation()
            store.kill()
            refused = stack.client.post(PATH, json=long_reply(conversation, 5))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "store_unavailable"
            assert refused.headers["retry-after"]
            ready = stack.client.get("/readyz")
            assert (ready.status_code, ready.json()["store"]) == (503, "down")
            store.start()
            until(lambda: stack.client.get("/readyz").status_code == 200)
            assert stack.client.post(PATH, json=long_reply(conversation, 5)).status_code == 200
            assert stack.variants(conversation)[0]["state"] == "completed"
    finally:
        store.stop()


def test_reply_outlives_a_restart_of_the_store(tmp_path: Path) -> None:
    embedded = prepare(tmp_path / "store")
    store = store_child(embedded, tmp_path)
    store.start()
    try:
        with run_stack(Stack(tmp_path, embedded)) as stack:
            conversation = stack.new_conversation()
            seen: list[str] = []
            with stack.client.stream("POST", PATH, json=long_reply(conversation, 300)) as reply:
                for line in reply.iter_lines():
                    seen.append(line)
                    if len(seen) == 10:
                        store.kill()
                        store.start()
            assert "data: [DONE]" in seen
            (variant,) = stack.variants(conversation)
            assert (variant["state"], variant["text"]) == ("completed", contents(seen))
    finally:
        store.stop()


def test_reply_whose_worker_was_killed_is_whole_after_its_restart(fragile: Stack) -> None:
    conversation = fragile.new_conversation()
    seen: list[str] = []
    with pytest.raises(httpx.HTTPError):
        read_and_kill(fragile, long_reply(conversation), seen, after_lines=40)
    fragile.gateway.start()
    until(lambda: fragile.variants(conversation)[0]["state"] == "completed", 20.0)
    text = fragile.variants(conversation)[0]["text"]
    assert isinstance(text, str)
    assert text.startswith(contents(seen))
    assert len(text) > len(contents(seen))
    again = fragile.client.post(PATH, json=long_reply(conversation, 5))
    assert again.status_code == 200


def test_worker_that_is_asked_to_leave_lets_its_replies_end(fragile: Stack) -> None:
    conversation = fragile.new_conversation()
    seen: list[str] = []
    leaver = threading.Thread(target=fragile.gateway.stop)
    with fragile.client.stream("POST", PATH, json=long_reply(conversation, 200)) as reply:
        for line in reply.iter_lines():
            seen.append(line)
            if len(seen) == 4:
                leaver.start()
    leaver.join()
    assert "data: [DONE]" in seen
    fragile.gateway.start()
    assert fragile.variants(conversation)[0]["state"] == "completed"


def test_engine_whose_queue_is_full_is_told_as_overload_before_anything_streams(
    valkey: EmbeddedStore, tmp_path: Path
) -> None:
    # With a second replica that is not there, the gateway lets one more in than the engine can take.
    limits = {"engine_max_ongoing": "1", "engine_max_queued": "0", "engine_replicas": "2"}
    with run_stack(Stack(tmp_path, valkey, limits)) as stack:
        first, second = stack.new_conversation(), stack.new_conversation()
        with stack.client.stream("POST", PATH, json=long_reply(first)) as reply:
            received = reply.iter_lines()
            next(received)
            refused = stack.client.post(PATH, json=long_reply(second))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
