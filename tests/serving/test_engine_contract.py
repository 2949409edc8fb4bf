"""The contract of every engine, in every way it is served."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable

import httpx
import orjson
import pytest

from tests.serving.conftest import MAX_ONGOING
from tests.serving.wire import Wire, request

LONG = {"max_tokens": 1500, "ignore_eos": True}
STEP_S = 0.02


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 20) -> None:
    """Returns once the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(STEP_S)


async def test_first_token_travels_alone_and_the_rest_follow(wire: Wire) -> None:
    reply = await wire.generate(sampling={"max_tokens": 40, "ignore_eos": True})
    assert len(reply.frames[0]["ids"]) == 1  # type: ignore[arg-type]  # JSON list
    assert len(reply.frames) > 2
    assert len(reply.ids) == 40


async def test_reply_ends_with_exactly_one_terminal_line(wire: Wire) -> None:
    reply = await wire.generate(sampling={"max_tokens": 10, "ignore_eos": True})
    assert [line for line in reply.lines if "text" not in line] == [reply.end]
    assert reply.end["finish"] == "length"
    assert reply.end["usage"]["completion_tokens"] == 10  # type: ignore[index]  # JSON object
    assert reply.end["usage"]["prompt_tokens"] > 0  # type: ignore[index]  # JSON object


async def test_same_request_has_the_same_reply(wire: Wire) -> None:
    first, second = await wire.generate("What is a river?"), await wire.generate("What is a river?")
    assert first.text == second.text != ""
    assert first.ids == second.ids


@pytest.mark.parametrize("content", ["Tell me about rivers.", "请把这句话重复一遍：你好，世界！今天天气很好。"])
@pytest.mark.parametrize("cut", [1, 2, 7, 16, 23])
async def test_resumed_reply_joins_byte_for_byte(wire: Wire, content: str, cut: int) -> None:
    whole = await wire.generate(content, sampling={"max_tokens": 24, "ignore_eos": True})
    first = await wire.generate(content, sampling={"max_tokens": cut, "ignore_eos": True})
    seen = "".join(str(frame["text"]) for frame in first.frames)
    rest = await wire.generate(
        content, sampling={"max_tokens": 24 - cut, "ignore_eos": True}, resume_token_ids=whole.ids[:cut]
    )
    assert whole.ids[:cut] == first.ids
    assert whole.ids[cut:] == rest.ids
    assert rest.end["usage"]["completion_tokens"] == 24 - cut  # type: ignore[index]  # JSON object
    assert (seen + rest.text).replace("\ufffd", "") == whole.text.replace("\ufffd", "")


async def test_no_frame_ever_splits_a_character(wire: Wire) -> None:
    reply = await wire.generate("重复：春天的河流。", sampling={"max_tokens": 60, "ignore_eos": True})
    assert "\ufffd" not in "".join(str(frame["text"]) for frame in reply.frames[:-1])


async def test_reply_stops_before_a_stop_string(wire: Wire) -> None:
    whole = await wire.generate(sampling={"max_tokens": 40, "ignore_eos": True})
    stop = re.findall(r"\w+", whole.text)[8]
    cut = await wire.generate(sampling={"max_tokens": 40, "ignore_eos": True, "stop": [stop]})
    assert cut.end["finish"] == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


async def test_reader_who_leaves_frees_the_place(wire: Wire) -> None:
    async with wire.client() as client:
        async with client.stream("POST", "/v1/generate", json=request("hello", sampling=LONG)) as response:
            chunks = response.aiter_bytes()  # kept: httpx closes the response when it is collected
            await anext(chunks)
            await eventually(lambda: _running_is(wire, 1))
        await eventually(lambda: _running_is(wire, 0))


async def test_reader_who_leaves_before_the_first_token_frees_the_place(wire: Wire) -> None:
    async with asyncio.TaskGroup() as group, wire.client() as client:
        bodies = [request(f"hello {index}", sampling=LONG) for index in range(wire.places)]
        posts = [group.create_task(client.post("/v1/generate", json=body)) for body in bodies]
        await eventually(lambda: _running_is(wire, wire.places))
        for post in posts:
            post.cancel()
    await eventually(lambda: _running_is(wire, 0))


async def test_aborted_reply_has_ended_in_the_engine_when_the_abort_is_answered(wire: Wire) -> None:
    async with asyncio.TaskGroup() as group, wire.client() as client:
        body = request("hello", sampling=LONG)
        async with client.stream("POST", "/v1/generate", json=body) as response:
            lines = response.aiter_lines()
            first = json.loads(await anext(lines))
            others = [group.create_task(client.post("/v1/generate", json=_long(n))) for n in range(MAX_ONGOING - 1)]
            await eventually(lambda: _running_is(wire, MAX_ONGOING))
            door = response.headers["x-onebox-replica"]
            receipt = (await client.post(f"{door}/v1/abort", json={"request_id": body["request_id"]})).json()
            assert await wire.running() == MAX_ONGOING - 1
            rest = [json.loads(line) async for line in lines]
        ids = [i for line in (first, *rest[:-1]) for i in line["ids"]]
        assert rest[-1]["error"]["code"] == "conflict"
        assert receipt["found"] is True
        assert receipt["freed_ms"] > 0
        assert receipt["completion_tokens"] == len(ids) >= 1
        next_one = await client.post("/v1/generate", json=request("more", sampling={"max_tokens": 2}))
        assert next_one.status_code == 200
        assert not any(other.done() for other in others)
        again = await client.post(f"{door}/v1/abort", json={"request_id": body["request_id"]})
        assert again.json() | {"freed_ms": 0} == {"found": False, "completion_tokens": 0, "freed_ms": 0}
        for other in others:
            other.cancel()
    await eventually(lambda: _running_is(wire, 0))


async def test_abort_of_a_waiting_request_frees_its_place(wire: Wire) -> None:
    async with asyncio.TaskGroup() as group, wire.client() as client:
        others = [group.create_task(client.post("/v1/generate", json=_long(n))) for n in range(MAX_ONGOING)]
        await eventually(lambda: _running_is(wire, MAX_ONGOING))
        body = _long(MAX_ONGOING)
        waiting = group.create_task(client.post("/v1/generate", json=body))
        await eventually(lambda: _running_is(wire, MAX_ONGOING + 1))
        door = (await client.get("/v1/model")).headers["x-onebox-replica"]
        receipt = (await client.post(f"{door}/v1/abort", json={"request_id": body["request_id"]})).json()
        assert receipt["found"] is True
        refused = await waiting
        assert refused.status_code in (200, 409)  # a scheduler that is quick may have drawn a token
        assert b"conflict" in refused.content
        for other in others:
            other.cancel()
    await eventually(lambda: _running_is(wire, 0))


async def test_door_is_named_by_every_answer_and_asks_for_the_token(wire: Wire) -> None:
    async with wire.client() as client:
        answers = [await client.get(path) for path in ("/v1/model", "/healthz", "/readyz", "/metrics", "/nowhere")]
        answers.append(await client.post("/v1/generate", json=request("hi", sampling={"max_tokens": 1})))
        (door,) = {answer.headers["x-onebox-replica"] for answer in answers}
        assert (await client.get(f"{door}/v1/model")).json() == answers[0].json()
    assert (await _get(f"{door}/v1/model")).status_code == 401


@pytest.mark.parametrize(
    "fields",
    [
        {"structured": {"choice": ["summarize", "translate"]}},
        {"sampling": {"max_tokens": 100, "stop": ["er"]}},
        {"sampling": {"max_tokens": 600}},
    ],
    ids=["choice", "stop string", "natural end"],
)
async def test_resumed_reply_that_was_whole_already_ends_at_once(wire: Wire, fields: dict[str, object]) -> None:
    whole = await wire.generate("What is 1+1? One word.", **fields)
    assert whole.end["finish"] == "stop"
    again = await wire.generate("What is 1+1? One word.", resume_token_ids=whole.ids, **fields)
    assert (again.text, again.ids) == ("", [])
    assert again.end["finish"] == "stop"
    assert again.end["usage"] == whole.end["usage"] | {"completion_tokens": 0}  # type: ignore[operator]  # JSON object


async def test_prompt_longer_than_the_context_is_refused_with_both_counts(wire: Wire) -> None:
    refused = await wire.refused("word " * (wire.context_length + 100))
    error = refused.json()["error"]
    assert refused.status_code == 400
    assert error["code"] == "context_length_exceeded"
    counts = [int(number) for number in re.findall(r"\d+", error["message"])]
    assert wire.context_length in counts
    assert max(counts) > wire.context_length


async def test_request_beyond_all_places_is_refused_and_told_when_to_return(wire: Wire) -> None:
    async with asyncio.TaskGroup() as group, wire.client() as client:
        bodies = [request(f"hello {index}", sampling=LONG) for index in range(wire.places)]
        posts = [group.create_task(client.post("/v1/generate", json=body)) for body in bodies]
        await eventually(lambda: _running_is(wire, wire.places))
        refused = await client.post("/v1/generate", json=request("one more"))
        for post in posts:
            post.cancel()
    assert refused.status_code == 429
    assert refused.json()["error"] | {"message": ""} == {"code": "overloaded", "message": "", "retryable": True}
    assert int(refused.headers["retry-after"]) >= 1
    await eventually(lambda: _running_is(wire, 0))


@pytest.mark.parametrize("path", ["/v1/model", "/healthz", "/readyz", "/metrics"])
async def test_stranger_is_refused_everywhere(wire: Wire, path: str) -> None:
    async with wire.client(token="wrong") as client:
        assert (await client.get(path)).status_code == 401
        assert (await client.post("/v1/generate", json=request("hello"))).json()["error"]["code"] == "invalid_api_key"
    assert (await _get(wire.url + path)).status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        b'{"request_id": "a"',
        b"\xff\xfe",
        b"[]",
        orjson.dumps(request("hello", sampling={"max_tokens": 0})),
        orjson.dumps(request("hello", messages=[])),
        orjson.dumps(request("hello", messages=[{"role": "tool", "content": "x"}])),
        orjson.dumps(request("hello", unknown=1)),
        orjson.dumps(request("hello", prompt_token_ids=[1])),
    ],
)
async def test_malformed_request_is_refused(wire: Wire, body: bytes) -> None:
    async with wire.client() as client:
        refused = await client.post("/v1/generate", content=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_request"


async def test_body_beyond_the_limit_is_refused(wire: Wire) -> None:
    refused = await wire.refused("x" * (1024 * 1024 + 1))
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"


async def test_choice_is_always_one_of_the_options(wire: Wire) -> None:
    options = ["summarize", "translate", "逻辑 推理"]
    asked = [
        wire.generate(f"Pick {n}", structured={"choice": options}, sampling={"temperature": 1.0, "seed": n})
        for n in range(4)
    ]
    for reply in await asyncio.gather(*asked):
        assert reply.text in options
        assert reply.end["finish"] == "stop"


async def test_reply_bound_to_a_schema_parses(wire: Wire) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    reply = await wire.generate("Make up a person", structured={"json_schema": schema}, sampling={"max_tokens": 120})
    person = json.loads(reply.text)
    assert set(person) == {"name", "age"}
    assert isinstance(person["age"], int)


async def test_logprobs_come_only_when_asked_and_one_per_token(wire: Wire) -> None:
    plain = await wire.generate()
    asked = await wire.generate(sampling={"max_tokens": 12, "top_logprobs": 3, "ignore_eos": True})
    assert not any("tokens" in frame for frame in plain.frames)
    tokens = [token for frame in asked.frames for token in frame["tokens"]]  # type: ignore[attr-defined]  # JSON list
    assert [token["id"] for token in tokens] == asked.ids
    assert all(token["logprob"] <= 0 and len(token["top"]) == 3 for token in tokens)
    for token in tokens:
        ranked = [rival["logprob"] for rival in token["top"]]
        assert ranked == sorted(ranked, reverse=True)


async def test_token_counts_agree_with_the_prompt(wire: Wire) -> None:
    messages = [{"role": "user", "content": "你好 world"}]
    async with wire.client() as client:
        counted = (await client.post("/v1/tokenize", json={"messages": messages})).json()
        text = (await client.post("/v1/tokenize", json={"text": "plain words here"})).json()
        neither = await client.post("/v1/tokenize", json={})
    reply = await wire.generate(messages=messages)
    assert counted["count"] == len(counted["ids"]) == len(counted["pieces"])
    assert reply.end["usage"]["prompt_tokens"] == counted["count"]  # type: ignore[index]  # JSON object
    assert "".join(text["pieces"]) == "plain words here"
    assert neither.status_code == 400


async def test_prompt_of_token_ids_is_taken_as_it_is(wire: Wire) -> None:
    reply = await wire.generate(messages=None, prompt_token_ids=[5, 6, 7], sampling={"max_tokens": 3})
    assert reply.end["usage"]["prompt_tokens"] == 3  # type: ignore[index]  # JSON object


async def test_reply_is_cut_where_the_context_ends(wire: Wire) -> None:
    prompt = [7] * (wire.context_length - 5)
    body = {"messages": None, "prompt_token_ids": prompt, "sampling": {"max_tokens": 50, "ignore_eos": True}}
    reply = await wire.generate(**body)
    assert reply.end["finish"] == "length"
    assert len(reply.ids) == 5
    again = await wire.generate(**body, resume_token_ids=reply.ids)
    assert (again.ids, again.end["finish"]) == ([], "length")


async def test_ready_engine_says_so_and_describes_itself(wire: Wire) -> None:
    async with wire.client() as client:
        ready, alive, card = await asyncio.gather(*(client.get(p) for p in ("/readyz", "/healthz", "/v1/model")))
        unknown = await client.get("/v2/anything")
    assert ready.status_code == alive.status_code == 200
    assert card.json()["version"] == 1
    assert card.json()["chat_template"] is True
    assert unknown.status_code == 404


async def test_headers_of_a_reply_do_not_grow_with_the_replies_before(wire: Wire) -> None:
    async with wire.client() as client:
        replies = [await client.post("/v1/generate", json=request("hi", sampling={"max_tokens": 1})) for _ in range(3)]
    assert len({len(reply.headers.multi_items()) for reply in replies}) == 1


async def test_streams_side_by_side_do_not_mix(wire: Wire) -> None:
    answers = [f"Number {n} is {word} and nothing else." for n, word in enumerate(("red", "green", "blue", "gold"))]
    asked = [wire.generate("Say it.", structured={"choice": [answer]}) for answer in answers]
    assert [reply.text for reply in await asyncio.gather(*asked)] == answers


def _long(number: int) -> dict[str, object]:
    return request(f"hello {number}", sampling=LONG)


async def _running_is(wire: Wire, count: int) -> bool:
    return await wire.running() == count


async def _get(url: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(url)
