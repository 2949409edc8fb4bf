"""Streams that are silent, readers that take nothing, engines that are full or break."""

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from deploy.store import EmbeddedStore
from tests.agents.processes import ADMIN_KEY, Stack, run_stack, until

PATH = "/v1/responses"
ASK = "Tell me about the river."


def post(stack: Stack, **fields: object) -> httpx.Response:
    body = {"model": "chat", "input": ASK, "max_output_tokens": 8} | fields
    return stack.client.post(PATH, json=body)


@pytest.fixture(scope="module")
def slow_stack(valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An engine with 200 ms between tokens and a gateway that soon gets impatient with silence."""
    extra = {"scripted_itl_ms": "200", "ping_s": "0.05"}
    with run_stack(Stack(tmp_path_factory.mktemp("slow"), valkey, extra)) as running:
        yield running


async def test_silent_stream_is_kept_alive_without_disturbing_the_stock_client(slow_stack: Stack) -> None:
    raw = post(slow_stack, stream=True, max_output_tokens=3).text
    assert raw.count(": ping\n") >= 3
    assert raw.endswith("\n\n")
    async with openai.AsyncOpenAI(base_url=f"{slow_stack.url}/v1", api_key=ADMIN_KEY, max_retries=0) as client:
        stream = await client.responses.create(model="chat", input=ASK, max_output_tokens=3, stream=True)
        told = [event async for event in stream]
        assert [event.sequence_number for event in told] == list(range(len(told)))
        chat = await client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": ASK}], max_tokens=3, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in chat if chunk.choices]
    assert told[-1].type == "response.incomplete"
    assert told[-1].response.output_text == "".join(pieces)


def test_reader_who_takes_nothing_is_dropped_and_may_resume(
    valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory
) -> None:
    extra = {"scripted_itl_ms": "0.1", "reader_stall_s": "0.5"}
    with run_stack(Stack(tmp_path_factory.mktemp("stall"), valkey, extra)) as stack:
        fields = {"model": "scripted", "max_output_tokens": 600, "include": ["message.output_text.logprobs"]}
        run_id = post(stack, background=True, top_logprobs=20, **fields).json()["id"]
        url = httpx.URL(stack.url)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((url.host, url.port))
            request = (
                f"GET {PATH}/{run_id}?stream=true HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ADMIN_KEY}\r\n\r\n"
            )
            reader.sendall(request.encode())
            until(lambda: "was dropped" in stack.gateway.log.read_text())
            told = b""
            try:
                while piece := reader.recv(65536):
                    told += piece
            except ConnectionResetError:
                pass
        assert b"response.completed" not in told
        assert not told.endswith(b"0\r\n\r\n")
        until(lambda: stack.client.get(f"{PATH}/{run_id}").json()["status"] == "completed")
        whole = stack.client.get(f"{PATH}/{run_id}?stream=true").text
        assert "event: response.completed\n" in whole


def test_full_box_is_a_clean_refusal(valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> None:
    extra = {"engine_max_ongoing": "1", "engine_max_queued": "0", "queue_per_place": "0"}
    with run_stack(Stack(tmp_path_factory.mktemp("full"), valkey, extra)) as stack:
        running = post(stack, background=True, max_output_tokens=4000).json()["id"]
        until(lambda: stack.engine_running() == 1)
        for how in ({}, {"stream": True}, {"background": True}):
            refused = post(stack, **how)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
        body = {"model": "chat", "input": ASK, "max_output_tokens": 8}
        headers = {"idempotency-key": "again"}  # such a request may be for a run that is there already; it is not
        for how in ({}, {"background": True}):
            refused = stack.client.post(PATH, json=body | how, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        stack.client.post(f"{PATH}/{running}/cancel")
        until(lambda: stack.engine_running() == 0)
        assert stack.client.post(PATH, json=body, headers=headers).status_code == 200


def test_reply_that_breaks_off_is_a_failed_response_with_its_text(
    valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory
) -> None:
    extra = {"engine_continuations": "0"}
    faults = ("--fail-at-token", "5")
    with run_stack(Stack(tmp_path_factory.mktemp("broken"), valkey, extra, faults)) as stack:
        whole = post(stack)
        assert whole.status_code == 200
        response = whole.json()
        assert (response["status"], response["error"]["type"]) == ("failed", "engine_failed")
        assert response["output"][0]["content"][0]["text"]
        assert response["output"][0]["status"] == "incomplete"
        told = [block for block in post(stack, stream=True).text.split("\n\n") if block]
        last = json.loads(told[-1].split("\n")[2].removeprefix("data: "))
        assert last["type"] == "response.failed"
        assert last["onebox"]["event"]["kind"] == "failed"
        assert last["response"]["output"][0]["content"] == response["output"][0]["content"]
