"""`/v1/responses` through the stock OpenAI client and through plain HTTP."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai.types.responses import Response

from onebox.events import Accepted, Completed, Event, Failed, Stopped, TextDelta, decode, encode
from onebox.response_events import response_event
from tests.agents.processes import Stack, until

PATH = "/v1/responses"
ASK = "Tell me about the river."


def post(api: httpx.Client, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
    body = {"model": "chat", "input": ASK, "max_output_tokens": 12} | fields
    return api.post(PATH, json=body, headers=headers)


def begin(api: httpx.Client, **fields: object) -> str:
    """The id of a new background run."""
    reply = post(api, background=True, **fields)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def blocks(text: str) -> list[str]:
    return [block for block in text.removesuffix("\n\n").split("\n\n") if block]


def log(api: httpx.Client, run_id: str, after: int | None = None) -> list[str]:
    """The blocks of the run's stream, to its end."""
    query = {"stream": "true"} | ({"starting_after": str(after)} if after is not None else {})
    reply = api.get(f"{PATH}/{run_id}", params=query)
    assert reply.status_code == 200, reply.text
    return blocks(reply.text)


def data(block: str) -> dict[str, object]:
    value: dict[str, object] = json.loads(block.split("\n")[2].removeprefix("data: "))
    return value


def events(told: list[str]) -> list[Event]:
    numbered = [response_event(data(block)) for block in told]
    assert [number for number, _ in numbered] == list(range(len(told)))
    return [event for _, event in numbered]


def text_of(found: list[Event]) -> str:
    return "".join(event.text for event in found if isinstance(event, TextDelta))


def read_some(api: httpx.Client, method: str, path: str, count: int, **request: object) -> list[str]:
    """The first `count` blocks of a stream, whose connection is then closed."""
    told: list[str] = []
    with api.stream(method, path, **request) as reply:  # type: ignore[arg-type]  # httpx's keywords
        rest = ""
        for chunk in reply.iter_text():
            *whole, rest = (rest + chunk).split("\n\n")
            told += whole
            if len(told) >= count:
                break
    return told[:count]


def status_of(api: httpx.Client, run_id: str) -> str:
    return str(api.get(f"{PATH}/{run_id}").json()["status"])


async def test_response_comes_whole(openai_client: openai.AsyncOpenAI) -> None:
    response = await openai_client.responses.create(
        model="chat", input=ASK, instructions="Be brief.", max_output_tokens=24, metadata={"who": "me"}
    )
    Response.model_validate(response.model_dump())
    assert (response.status, response.model, response.instructions) == ("incomplete", "chat", "Be brief.")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 24
    assert response.output_text
    again = await openai_client.responses.retrieve(response.id)
    assert again == response


async def test_stream_has_typed_events_that_add_up_to_the_response(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.responses.create(model="chat", input=ASK, stream=True)
    told = [event async for event in stream]
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert told[0].type == "response.created"
    assert told[-1].type == "response.completed"
    deltas = [event.delta for event in told if event.type == "response.output_text.delta"]
    assert len(deltas) >= 3
    assert "".join(deltas) == told[-1].response.output_text
    assert told[-1].response.status == "completed"


async def test_stream_helper_accumulates_the_reply(openai_client: openai.AsyncOpenAI) -> None:
    async with openai_client.responses.stream(model="chat", input=ASK) as stream:
        pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert final.output_text == "".join(pieces)
    assert (await openai_client.responses.retrieve(final.id)).output_text == final.output_text


async def test_background_response_is_there_later(openai_client: openai.AsyncOpenAI, api: httpx.Client) -> None:
    response = await openai_client.responses.create(model="chat", input=ASK, max_output_tokens=12, background=True)
    assert (response.status, response.background) == ("in_progress", True)
    until(lambda: status_of(api, response.id) != "in_progress")
    done = await openai_client.responses.retrieve(response.id)
    assert done.status == "incomplete"
    assert done.output_text == text_of(events(log(api, response.id)))


async def test_background_stream_is_resumed_by_the_stock_client(openai_client: openai.AsyncOpenAI) -> None:
    first = await openai_client.responses.create(model="chat", input=ASK, background=True, stream=True)
    run_id, seen = "", []
    async for event in first:
        seen.append(event)
        if event.type == "response.created":
            run_id = event.response.id
        if len(seen) == 8:
            break
    await first.close()
    rest = await openai_client.responses.retrieve(run_id, stream=True, starting_after=seen[-1].sequence_number)
    seen += [event async for event in rest]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].type == "response.completed"
    deltas = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert deltas == seen[-1].response.output_text


async def test_stream_helper_resumes_a_stored_response(openai_client: openai.AsyncOpenAI, api: httpx.Client) -> None:
    run_id = begin(api, max_output_tokens=400)
    async with openai_client.responses.stream(response_id=run_id, starting_after=5) as stream:
        numbers = [event.sequence_number async for event in stream]
        final = await stream.get_final_response()
    assert numbers == list(range(6, len(log(api, run_id))))
    assert final.output_text == text_of(events(log(api, run_id)))


async def test_cancelled_response_keeps_its_text_and_frees_the_engine(
    openai_client: openai.AsyncOpenAI, api: httpx.Client, stack: Stack
) -> None:
    run_id = begin(api, max_output_tokens=2000)
    read_some(api, "GET", f"{PATH}/{run_id}?stream=true", 8)
    cancelled = await openai_client.responses.cancel(run_id)
    until(lambda: stack.engine_running() == 0)
    found = events(log(api, run_id))
    assert (cancelled.id, cancelled.status, cancelled.output_text) == (run_id, "cancelled", text_of(found))
    assert isinstance(found[-1], Stopped)
    assert found[-1].tokens > 0
    assert api.post(f"{PATH}/{run_id}/cancel").json() == api.get(f"{PATH}/{run_id}").json()
    assert len(log(api, run_id)) == len(found)


async def test_deleted_response_is_gone(openai_client: openai.AsyncOpenAI) -> None:
    response = await openai_client.responses.create(model="chat", input=ASK, max_output_tokens=4)
    await openai_client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError) as refused:
        await openai_client.responses.retrieve(response.id)
    assert refused.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError):
        await openai_client.responses.retrieve(response.id, stream=True, starting_after=2)


async def test_input_items_are_the_messages(openai_client: openai.AsyncOpenAI) -> None:
    response = await openai_client.responses.create(
        model="chat",
        instructions="Be brief.",
        input=[
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": [{"type": "input_text", "text": "three"}]},
        ],
        max_output_tokens=4,
    )
    items = [item async for item in openai_client.responses.input_items.list(response.id, order="asc", limit=2)]
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr,index]  # all are text
    assert texts == ["one", "two", "three"]
    newest = await openai_client.responses.input_items.list(response.id, limit=1)
    assert newest.data[0].id == items[-1].id
    assert newest.has_more


async def test_previous_response_is_the_history(openai_client: openai.AsyncOpenAI) -> None:
    first = await openai_client.responses.create(
        model="scripted", input=ASK, instructions="Be brief.", max_output_tokens=12
    )
    second = await openai_client.responses.create(
        model="scripted", input="And the sea?", previous_response_id=first.id, max_output_tokens=12
    )
    items = [item async for item in openai_client.responses.input_items.list(second.id, order="asc")]
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr,index]  # all are text
    assert texts == [ASK, first.output_text, "And the sea?"]
    assert second.previous_response_id == first.id
    by_hand = await openai_client.responses.create(
        model="scripted",
        input=[
            {"role": "user", "content": ASK},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And the sea?"},
        ],
        max_output_tokens=12,
    )
    assert second.output_text == by_hand.output_text


def test_previous_response_must_be_there_and_over(api: httpx.Client) -> None:
    unknown = post(api, previous_response_id="resp_00")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "response_not_found")
    run_id = begin(api, max_output_tokens=2000)
    busy = post(api, previous_response_id=run_id)
    assert (busy.status_code, busy.json()["error"]["param"]) == (409, "previous_response_id")
    assert int(busy.headers["retry-after"]) >= 1
    api.post(f"{PATH}/{run_id}/cancel")


def test_response_can_be_a_turn_of_a_conversation(api: httpx.Client, stack: Stack) -> None:
    conversation = stack.new_conversation()
    first = post(api, conversation=conversation).json()
    assert first["conversation"] == {"id": conversation}
    assert [variant["text"] for variant in stack.variants(conversation)] == [first["output"][0]["content"][0]["text"]]
    again = post(api, conversation={"id": conversation}, input="", onebox={"regenerate": True}, seed=5).json()
    assert again["onebox"]["turn"] == first["onebox"]["turn"]
    assert [variant["run_id"] for variant in stack.variants(conversation)] == [first["id"], again["id"]]
    running = begin(api, conversation=conversation, max_output_tokens=2000)
    assert post(api, conversation=conversation).status_code == 409
    api.post(f"{PATH}/{running}/cancel")
    edited = post(api, conversation=conversation, input="Another", onebox={"edit": first["onebox"]["turn"]})
    assert edited.status_code == 200
    turns = api.get(f"/v1/conversations/{conversation}").json()["turns"]
    assert [turn["user"] for turn in turns] == ["Another"]


async def test_logprobs_are_sent_to_those_who_ask(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.responses.create(
        model="scripted",
        input=ASK,
        max_output_tokens=6,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        stream=True,
    )
    told = [event async for event in stream]
    tokens = [token for event in told if event.type == "response.output_text.delta" for token in event.logprobs]
    final = told[-1].response  # type: ignore[union-attr]  # the terminal event has it
    assert "".join(token.token for token in tokens) == final.output_text
    assert all(len(token.top_logprobs or []) == 2 for token in tokens)
    whole = await openai_client.responses.retrieve(final.id)
    assert [token.token for token in whole.output[0].content[0].logprobs] == [token.token for token in tokens]  # type: ignore[union-attr]


def test_log_is_the_same_from_every_number(api: httpx.Client) -> None:
    run_id = begin(api)
    whole = log(api, run_id)
    found = events(whole)
    assert isinstance(found[0], Accepted)
    assert isinstance(found[-1], Completed)
    for after in range(len(whole)):
        rest = log(api, run_id, after)
        by_header = api.get(f"{PATH}/{run_id}?stream=true", headers={"last-event-id": str(after)})
        assert blocks(by_header.text) == rest
        if after == len(whole) - 1:
            assert by_header.text == ": end\n"
        else:
            assert rest == whole[after + 1 :]


def test_reader_who_leaves_after_any_event_of_a_running_reply_gets_the_rest(api: httpx.Client) -> None:
    count, left = 0, 0
    while left <= count:
        run_id = begin(api, max_output_tokens=6)
        seen = read_some(api, "GET", f"{PATH}/{run_id}?stream=true", left + 1)
        rest = log(api, run_id, left) if len(seen) == left + 1 else []
        whole = log(api, run_id)
        assert [block for block in seen + rest if block != ": end\n"] == whole
        events(whole)
        count, left = len(whole) - 1, left + 1


def test_all_readers_see_the_same_bytes(api: httpx.Client, stack: Stack) -> None:
    run_id = begin(api, max_output_tokens=120)
    with ThreadPoolExecutor(4) as pool:
        early = [pool.submit(log, api, run_id) for _ in range(3)]
        read_some(api, "GET", f"{PATH}/{run_id}?stream=true", 10)
        late = pool.submit(log, api, run_id)
        told = [reader.result() for reader in (*early, late)]
    assert told[0] == told[1] == told[2] == told[3] == log(api, run_id)
    assert isinstance(events(told[0])[-1], Completed)


def test_foreground_run_is_stopped_when_its_reader_leaves(api: httpx.Client, stack: Stack) -> None:
    body = {"model": "chat", "input": ASK, "max_output_tokens": 2000, "stream": True}
    seen = read_some(api, "POST", PATH, 8, json=body)
    run_id = str(data(seen[0])["response"]["id"])  # type: ignore[index]  # an object
    until(lambda: status_of(api, run_id) == "cancelled")
    until(lambda: stack.engine_running() == 0)
    assert log(api, run_id)[:8] == seen


@pytest.mark.parametrize("extra", [{"json": {"background": True}}, {"headers": {"idempotency-key": "leave-1"}}])
def test_durable_run_goes_on_when_its_reader_leaves(api: httpx.Client, extra: dict[str, dict[str, object]]) -> None:
    body = {"model": "chat", "input": ASK, "max_output_tokens": 60, "stream": True} | extra.get("json", {})
    seen = read_some(api, "POST", PATH, 8, json=body, headers=extra.get("headers", {}))
    run_id = str(data(seen[0])["response"]["id"])  # type: ignore[index]  # an object
    whole = log(api, run_id)
    assert whole[:8] == seen
    assert isinstance(events(whole)[-1], Completed)


def test_idempotency_key_joins_the_same_request_and_refuses_another(api: httpx.Client) -> None:
    headers = {"idempotency-key": "key 1"}
    first = post(api, headers).json()
    spaced = json.dumps({"max_output_tokens": 12, "input": ASK, "model": "chat"}, indent=2)
    again = api.post(PATH, content=spaced, headers=headers | {"content-type": "application/json"}).json()
    assert again == first
    other = post(api, headers, input="Something else.")
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    assert post(api, {"idempotency-key": "key 2"}).json()["id"] != first["id"]


def test_requests_with_one_key_at_once_make_one_run(api: httpx.Client) -> None:
    barrier = threading.Barrier(6)

    def send() -> str:
        barrier.wait()
        return str(post(api, {"idempotency-key": "race"}, max_output_tokens=40).json()["id"])

    with ThreadPoolExecutor(6) as pool:
        told = [sent.result() for sent in [pool.submit(send) for _ in range(6)]]
    assert len(set(told)) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "schlüssel"])
def test_unusable_idempotency_key_is_refused(api: httpx.Client, key: str) -> None:
    body = json.dumps({"input": ASK}).encode()
    headers = [(b"content-type", b"application/json"), (b"idempotency-key", key.encode("latin-1"))]
    refused = api.post(PATH, content=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": " \n"}, "input"),
        ({"input": [{"role": "assistant", "content": "hi"}]}, "input"),
        ({"input": [{"role": "wizard", "content": "hi"}]}, "input.0.role"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input.0.type"),
        ({"input": "a\0b"}, "input.0.content"),
        ({"input": [{"role": "user", "content": "x"}] * 513}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 8193}, "max_output_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"top_logprobs": 3}, None),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, None),
        ({"conversation": "conv_1", "instructions": "Be brief."}, "instructions"),
        ({"onebox": {"regenerate": True}}, None),
        ({"onebox": {"params": {"nope": 1}}}, "params.nope"),
    ],
)
def test_bad_field_is_refused_by_name(api: httpx.Client, fields: dict[str, object], param: str | None) -> None:
    refused = post(api, **fields)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "invalid_request"), refused.text
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("query", "header"), [("starting_after=x", ""), ("starting_after=-1", ""), ("", "12a"), ("", "-3"), ("", "9" * 30)]
)
def test_place_that_is_no_number_is_refused(api: httpx.Client, query: str, header: str) -> None:
    run_id = begin(api)
    refused = api.get(f"{PATH}/{run_id}?stream=true&{query}", headers={"last-event-id": header})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("name", ["resp_00", "run_1", "resp_00:events", "x" * 500, "resp_%0a"])
def test_unknown_response_is_refused_everywhere(api: httpx.Client, name: str) -> None:
    for method, path in (
        ("GET", name),
        ("GET", f"{name}?stream=true&starting_after=3"),
        ("POST", f"{name}/cancel"),
        ("DELETE", name),
        ("GET", f"{name}/input_items"),
    ):
        refused = api.request(method, f"{PATH}/{path}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "response_not_found")


def test_encoded_events_are_what_the_log_keeps(api: httpx.Client) -> None:
    found = events(log(api, begin(api)))
    assert [decode(encode(event)) for event in found] == found
    assert not [event for event in found if isinstance(event, Failed)]


def test_chat_and_task_runs_are_responses_too(api: httpx.Client) -> None:
    ask = [{"role": "user", "content": ASK}]
    chat = api.post("/v1/chat/completions", json={"model": "write", "messages": ask, "max_tokens": 8}).json()
    task = api.post("/v1/tasks/write", json={"text": ASK, "max_tokens": 8}).json()
    for run_id, text in ((chat["id"], chat["choices"][0]["message"]["content"]), (task["run_id"], task["text"])):
        response = Response.model_validate(api.get(f"{PATH}/{run_id}").json())
        assert (response.model, response.status, response.output_text) == ("write", "incomplete", text)
        assert text_of(events(log(api, run_id))) == text


def test_idempotency_key_belongs_to_one_route(api: httpx.Client) -> None:
    headers = {"idempotency-key": "routes"}
    body = {"model": "chat", "messages": [{"role": "user", "content": ASK}], "max_tokens": 8}
    first = api.post("/v1/chat/completions", json=body, headers=headers).json()
    again = api.post("/v1/chat/completions", json=body, headers=headers).json()
    assert (again["id"], again["choices"]) == (first["id"], first["choices"])
    assert post(api, headers).status_code == 422
