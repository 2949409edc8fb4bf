"""`POST /v1/chat/completions` through the stock OpenAI client and through plain HTTP."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.agents.processes import ADMIN_KEY, Stack

ASK = [{"role": "user", "content": "Tell me about the river."}]
PATH = "/v1/chat/completions"


def post(api: httpx.Client, **fields: object) -> httpx.Response:
    return api.post(PATH, json={"messages": ASK, "max_tokens": 8} | fields)


def lines(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


async def test_stream_comes_in_pieces_that_add_up_to_the_whole_reply(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "Tell me about the river."}],
        max_tokens=40,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    whole = await openai_client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "Tell me about the river."}], max_tokens=40, seed=7
    )
    assert len(pieces) >= 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40


def test_stream_names_its_route_in_the_first_chunk_and_ends_with_done(api: httpx.Client) -> None:
    told = lines(post(api, stream=True).text)
    first = json.loads(told[0])
    assert first["onebox"]["run_id"] == first["id"]
    assert first["onebox"]["route"]["plan"][0] in first["onebox"]["route"]["probabilities"]
    assert told[-1] == "[DONE]"


def test_events_are_sent_to_those_who_ask(api: httpx.Client) -> None:
    told = [json.loads(line) for line in lines(post(api, stream=True, onebox={"events": True}).text)[:-1]]
    kinds = [chunk["onebox"]["event"]["kind"] for chunk in told if "event" in chunk.get("onebox", {})]
    assert kinds[:2] == ["routed", "step_started"]
    assert kinds[-1] == "step_done"
    quiet = [json.loads(line) for line in lines(post(api, stream=True).text)[:-1]]
    assert not [chunk for chunk in quiet if "event" in chunk.get("onebox", {})]


def test_task_as_model_pins_the_task(api: httpx.Client) -> None:
    route = post(api, model="write").json()["onebox"]["route"]
    assert (route["task"], route["tier"]) == ("write", "explicit")


def test_engine_model_is_asked_without_a_plugin(api: httpx.Client) -> None:
    reply = post(api, model="scripted").json()
    assert reply["onebox"]["route"] is None
    chat = post(api, model="chat").json()
    assert reply["usage"]["prompt_tokens"] <= chat["usage"]["prompt_tokens"]


async def test_unknown_model_is_refused_with_the_known_ones(openai_client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'nope'.*'auto'.*'chat'.*'scripted'") as refused:
        await openai_client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hi"}])
    assert refused.value.code == "model_not_found"


async def test_models_are_listed_for_the_stock_client(openai_client: openai.AsyncOpenAI) -> None:
    names = [model.id async for model in openai_client.models.list()]
    assert names[0] == "auto"
    assert {"chat", "scripted"} <= set(names)
    assert (await openai_client.models.retrieve("chat")).id == "chat"


async def test_logprobs_have_as_many_rivals_as_asked(openai_client: openai.AsyncOpenAI) -> None:
    reply = await openai_client.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=5,
        logprobs=True,
        top_logprobs=2,
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content or []
    assert len(content) == 5
    assert "".join(token.token for token in content) == reply.choices[0].message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in content)


def test_streamed_logprobs_cover_every_token(api: httpx.Client) -> None:
    told = [json.loads(line) for line in lines(post(api, stream=True, logprobs=True, model="scripted").text)[:-1]]
    tokens = [t["token"] for c in told for x in c["choices"] for t in (x["logprobs"] or {"content": []})["content"]]
    assert "".join(tokens) == "".join(x["delta"].get("content", "") for c in told for x in c["choices"])
    assert len(tokens) == 8


def test_several_replies_come_with_one_request(api: httpx.Client) -> None:
    reply = post(api, n=3, seed=1, model="chat").json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["completion_tokens"] == 24


def test_max_tokens_is_clamped_to_the_room_the_context_leaves(api: httpx.Client) -> None:
    text = "word " * 8100
    reply = post(api, model="scripted", messages=[{"role": "user", "content": text}], max_tokens=8000)
    assert reply.status_code == 200
    assert reply.json()["usage"]["total_tokens"] <= 8192


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "  \n"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x"}] * 513}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 8193}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 5}, "n"),
        ({"n": 2, "stream": True}, None),
        ({"top_logprobs": 3}, None),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"onebox": {"converzation": "x"}}, "onebox.converzation"),
        ({"onebox": {"regenerate": True}}, "onebox"),
        ({"model": "chat", "onebox": {"params": {"nope": 1}}}, "params.nope"),
    ],
)
def test_bad_field_is_refused_by_name(api: httpx.Client, fields: dict[str, object], param: str | None) -> None:
    refused = post(api, **fields)
    error = refused.json()["error"]
    assert refused.status_code == 400
    assert (error["code"], error["param"]) == ("invalid_request", param)
    assert "Traceback" not in refused.text


@pytest.mark.parametrize(
    "body",
    [b'{"messages": [', b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', b'{"model":"\\ud800"}', b"[1]", b""],
)
def test_body_that_is_no_json_object_is_refused(api: httpx.Client, body: bytes) -> None:
    refused = api.post(PATH, content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("chunked", [False, True])
def test_two_megabytes_are_refused_with_or_without_a_length(api: httpx.Client, chunked: bool) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 2_000_000}]}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    refused = api.post(PATH, content=pieces() if chunked else body, headers={"content-type": "application/json"})
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"


def test_prompt_beyond_the_context_is_refused_with_both_counts_before_anything_streams(api: httpx.Client) -> None:
    text = "word " * 9000
    refused = post(api, model="scripted", stream=True, messages=[{"role": "user", "content": text}])
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/json"
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "9007" in error["message"]
    assert "8192" in error["message"]


@pytest.mark.parametrize("header", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {ADMIN_KEY}"}])
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/v1/conversations", "/v1/tasks", "/nowhere"])
def test_nothing_is_told_without_a_key(stack: Stack, path: str, header: dict[str, str]) -> None:
    refused = httpx.post(stack.url + path, content=b"{", headers=header, trust_env=False)
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"


def test_unknown_path_and_method_answer_in_the_same_shape(api: httpx.Client) -> None:
    assert api.get("/nowhere").json()["error"]["code"] == "not_found"
    refused = api.put(PATH)
    assert refused.status_code == 405
    assert refused.json()["error"]["code"] == "invalid_request"


def test_readiness_and_metrics_are_open(stack: Stack) -> None:
    ready = httpx.get(f"{stack.url}/readyz", trust_env=False)
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "store": "ok", "engine": "ready", "model": "scripted", "detail": ""}
    assert "onebox_runs_running" in httpx.get(f"{stack.url}/metrics", trust_env=False).text


def test_slash_command_pins_the_task_and_is_not_part_of_the_text(api: httpx.Client) -> None:
    plain = post(api, model="write", messages=[{"role": "user", "content": "a line about rain"}], seed=3).json()
    reply = post(api, messages=[{"role": "user", "content": "/write a line about rain"}], seed=3).json()
    assert (reply["onebox"]["route"]["task"], reply["onebox"]["route"]["tier"]) == ("write", "explicit")
    assert reply["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_chain_replies_with_its_last_step_and_shows_the_others_as_progress(api: httpx.Client) -> None:
    text = "Summarize the text below and then translate the summary into Chinese.\n\n" + "The river is long. " * 30
    reply = post(api, messages=[{"role": "user", "content": text}], stream=True, max_tokens=30, onebox={"events": True})
    told = [json.loads(line) for line in lines(reply.text)[:-1]]
    events = [chunk["onebox"]["event"] for chunk in told if "event" in chunk.get("onebox", {})]
    assert told[0]["onebox"]["route"]["plan"] == ["summarize", "translate"]
    assert [event["task"] for event in events if event["kind"] == "step_done"] == ["summarize", "translate"]
    first_text = next(n for n, c in enumerate(told) if c["choices"] and c["choices"][0]["delta"].get("content"))
    first_done = next(n for n, c in enumerate(told) if c.get("onebox", {}).get("event", {}).get("kind") == "step_done")
    assert first_done < first_text
