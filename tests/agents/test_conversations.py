"""Conversations through the API: what is stored, what a turn leaves behind, and who may see it."""

import hashlib
import json
from contextlib import suppress

import httpx
import pytest
import redis

from deploy.store import EmbeddedStore
from tests.agents.processes import Stack, until

PATH = "/v1/chat/completions"


def say(stack: Stack, conversation: str, text: str, **fields: object) -> httpx.Response:
    options = {"conversation": conversation} | fields.pop("onebox", {})  # type: ignore[operator]
    messages = [{"role": "user", "content": text}] if text else []
    return stack.client.post(PATH, json={"messages": messages, "max_tokens": 6, "onebox": options} | fields)


def read(stack: Stack, conversation: str) -> dict[str, object]:
    reply = stack.client.get(f"/v1/conversations/{conversation}")
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_turn_is_kept_with_its_reply_route_and_usage(stack: Stack) -> None:
    conversation = stack.new_conversation()
    reply = say(stack, conversation, "What is a river?", model="qa").json()
    stored = read(stack, conversation)
    (turn,) = stored["turns"]  # type: ignore[misc]
    assert stored["title"] == "What is a river?"
    assert turn["id"] == reply["onebox"]["turn"]
    assert turn["user"] == "What is a river?"
    (variant,) = turn["variants"]
    assert variant["text"] == reply["choices"][0]["message"]["content"]
    assert (variant["run_id"], variant["task"], variant["state"]) == (reply["id"], "qa", "completed")
    assert variant["route"]["tier"] == "explicit"
    assert variant["usage"]["completion_tokens"] == 6


def test_earlier_turns_are_part_of_the_next_prompt(stack: Stack) -> None:
    conversation = stack.new_conversation()
    first = say(stack, conversation, "Hello there", model="scripted").json()["usage"]["prompt_tokens"]
    second = say(stack, conversation, "Hello there", model="scripted").json()["usage"]["prompt_tokens"]
    assert second > first + 6


def test_regenerating_adds_a_variant_and_may_change_the_task(stack: Stack) -> None:
    conversation = stack.new_conversation()
    say(stack, conversation, "What is a river?", model="qa")
    again = say(stack, conversation, "", model="write", onebox={"regenerate": True})
    assert again.status_code == 200
    (turn,) = read(stack, conversation)["turns"]  # type: ignore[misc]
    assert [variant["task"] for variant in turn["variants"]] == ["qa", "write"]
    assert turn["chosen"] == 1


def test_regenerating_an_empty_conversation_is_refused(stack: Stack) -> None:
    assert say(stack, stack.new_conversation(), "", onebox={"regenerate": True}).status_code == 404


def test_editing_a_turn_drops_it_and_all_after_it(stack: Stack) -> None:
    conversation = stack.new_conversation()
    for text in ("one", "two", "three"):
        say(stack, conversation, text, model="chat")
    turns: list[dict[str, object]] = read(stack, conversation)["turns"]  # type: ignore[assignment]
    edited = say(stack, conversation, "zwei", model="chat", onebox={"edit": turns[1]["id"]})
    assert edited.status_code == 200
    after: list[dict[str, object]] = read(stack, conversation)["turns"]  # type: ignore[assignment]
    assert [turn["user"] for turn in after] == ["one", "zwei"]
    assert say(stack, conversation, "x", onebox={"edit": turns[2]["id"]}).status_code == 404


def test_second_reply_waits_for_no_one_and_the_stop_of_the_first_reaches_the_engine(stack: Stack) -> None:
    conversation = stack.new_conversation()
    body = {
        "messages": [{"role": "user", "content": "Write on"}],
        "model": "chat",
        "max_tokens": 4000,
        "stream": True,
        "onebox": {"conversation": conversation},
    }
    with stack.client.stream("POST", PATH, json=body) as reply:
        received = reply.iter_lines()
        assert any('"content":"' in line and '"content":""' not in line for line in received)
        busy = say(stack, conversation, "And me?")
        assert busy.status_code == 409
        assert busy.json()["error"]["code"] == "conflict"
        assert stack.engine_running() == 1
    until(lambda: stack.engine_running() == 0, 2.0)
    until(lambda: stack.variants(conversation)[-1]["state"] == "stopped", 2.0)
    assert stack.variants(conversation)[-1]["text"]
    assert say(stack, conversation, "Now me", model="chat").status_code == 200


def test_reader_of_a_whole_reply_who_leaves_frees_the_engine(stack: Stack) -> None:
    conversation = stack.new_conversation()
    with suppress(httpx.ReadTimeout):
        stack.client.post(
            PATH,
            json={
                "messages": [{"role": "user", "content": "Write on"}],
                "model": "chat",
                "max_tokens": 4000,
                "onebox": {"conversation": conversation},
            },
            timeout=0.5,
        )
    until(lambda: stack.engine_running() == 0, 2.0)
    until(lambda: stack.variants(conversation)[-1]["state"] == "stopped", 2.0)


def test_refused_prompt_leaves_the_question_and_its_error_in_the_conversation(stack: Stack) -> None:
    conversation = stack.new_conversation()
    refused = say(stack, conversation, "word " * 9000, model="scripted", stream=True)
    assert refused.status_code == 400
    (variant,) = stack.variants(conversation)
    assert variant["state"] == "failed"
    assert variant["error"]["code"] == "context_length_exceeded"  # type: ignore[index]
    assert say(stack, conversation, "short", model="scripted").status_code == 200


def test_deleting_a_conversation_while_it_is_answered_leaves_nothing_behind(
    stack: Stack, valkey: EmbeddedStore
) -> None:
    conversation = stack.new_conversation()
    body = {
        "messages": [{"role": "user", "content": "Write on"}],
        "model": "chat",
        "max_tokens": 4000,
        "stream": True,
        "onebox": {"conversation": conversation},
    }
    with stack.client.stream("POST", PATH, json=body) as reply:
        received = reply.iter_lines()
        next(received)
        assert stack.engine_running() == 1
        assert stack.client.delete(f"/v1/conversations/{conversation}").status_code == 200
    until(lambda: stack.engine_running() == 0, 2.0)
    with redis.Redis.from_url(valkey.url) as store:
        assert store.keys(f"*{conversation}*") == []
    assert stack.client.get(f"/v1/conversations/{conversation}").status_code == 404


def test_list_is_newest_first_pages_by_cursor_and_searches_titles(stack: Stack) -> None:
    made = [
        stack.client.post("/v1/conversations", json={"title": f"Pagination {n} 标题"}).json()["id"] for n in range(5)
    ]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        parameters = {"q": "pagination", "limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = stack.client.get("/v1/conversations", params=parameters).json()
        seen += [item["id"] for item in page["data"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == made[::-1]
    found = stack.client.get("/v1/conversations", params={"q": "3 标"}).json()["data"]
    assert [item["id"] for item in found] == [made[3]]


def test_conversation_is_renamed_exported_and_deleted(stack: Stack) -> None:
    conversation = stack.new_conversation()
    reply = say(stack, conversation, "What is a river?", model="qa").json()["choices"][0]["message"]["content"]
    path = f"/v1/conversations/{conversation}"
    assert stack.client.patch(path, json={"title": "河流"}).status_code == 200
    exported = stack.client.get(f"{path}/export", params={"format": "json"})
    assert json.loads(exported.content)["title"] == "河流"
    text = stack.client.get(f"{path}/export", params={"format": "markdown"}).text
    assert "# 河流" in text
    assert reply in text
    assert stack.client.delete(path).status_code == 200
    assert stack.client.delete(path).status_code == 404
    assert stack.client.patch(path, json={"title": "x"}).status_code == 404


def test_feedback_is_kept_with_its_variant_and_can_be_taken_back(stack: Stack) -> None:
    conversation = stack.new_conversation()
    run_id = say(stack, conversation, "hello", model="chat").json()["id"]
    for value in ("like", "dislike", None):
        body = {"conversation": conversation, "run_id": run_id, "value": value}
        assert stack.client.post("/v1/feedback", json=body).status_code == 200
        assert stack.variants(conversation)[0]["feedback"] == value
    body = {"conversation": conversation, "run_id": "run_other", "value": "like"}
    assert stack.client.post("/v1/feedback", json=body).status_code == 404


@pytest.mark.parametrize("suffix", ["", "/export"])
def test_other_tenants_see_nothing(stack: Stack, valkey: EmbeddedStore, suffix: str) -> None:
    conversation = stack.new_conversation()
    with redis.Redis.from_url(valkey.url) as store:
        record = json.dumps({"tenant": "other", "admin": False, "created": 0})
        store.hset("onebox:keys", hashlib.sha256(b"other-key").hexdigest(), record)
    other = {"authorization": "Bearer other-key"}
    assert stack.client.get(f"/v1/conversations/{conversation}{suffix}", headers=other).status_code == 404
    assert stack.client.get("/v1/conversations", headers=other).json()["data"] == []
    refused = stack.client.post(
        PATH,
        json={"messages": [{"role": "user", "content": "hi"}], "onebox": {"conversation": conversation}},
        headers=other,
    )
    assert refused.json()["error"]["code"] == "conversation_not_found"
