"""The encoder of OpenAI responses, against the stock client's own types and its accumulator."""

import json

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseFailedEvent,
    ResponseIncompleteEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)
from pydantic import BaseModel

from agents.responses_wire import ResponseEncoder, ResponseFields, fields_of
from onebox.events import (
    Accepted,
    Alternative,
    Check,
    Citation,
    Completed,
    Event,
    Failed,
    Output,
    Progress,
    Queued,
    Routed,
    StepDone,
    StepStarted,
    Stopped,
    TextDelta,
    Token,
    Usage,
)
from onebox.response_events import response_event

RUN = "resp_" + "ab" * 12
FIELDS = ResponseFields("chat", "Be brief.", None, 64, 0.5, 0.9, None, {"who": "me"}, True)
MODELS: dict[str, type[BaseModel]] = {
    "response.created": ResponseCreatedEvent,
    "response.output_item.added": ResponseOutputItemAddedEvent,
    "response.content_part.added": ResponseContentPartAddedEvent,
    "response.output_text.delta": ResponseTextDeltaEvent,
    "response.output_text.done": ResponseTextDoneEvent,
    "response.content_part.done": ResponseContentPartDoneEvent,
    "response.output_item.done": ResponseOutputItemDoneEvent,
    "response.completed": ResponseCompletedEvent,
    "response.incomplete": ResponseIncompleteEvent,
    "response.failed": ResponseFailedEvent,
}
TOKEN = Token("水", 7, -0.25, (Alternative("水", 7, -0.25), Alternative("a", 9, -2.0)))
HEAD: list[Event] = [
    Accepted(RUN, "conv_1", "turn_1"),
    Routed("chat", ("chat",), {"chat": 1.0}, "explicit", 0.1),
    StepStarted(0, "chat"),
    Progress(1, 2, "reading"),
]
OPEN: list[Event] = [Output("item_added"), Output("part_added")]
TEXT: list[Event] = [TextDelta("Hello,\n"), Citation("a", 0, 4, "Helo"), TextDelta(' "wörld" 水\u2028'), TextDelta("!")]
CLOSE: list[Event] = [Output("text_done"), Output("part_done"), Output("item_done"), Usage(12, 5)]
STEP = StepDone(0, "chat")
WHOLE: list[Event] = [*HEAD, *OPEN, *TEXT, Check("length", True), STEP, *CLOSE, Completed()]
STORIES: dict[str, list[Event]] = {
    "completed": WHOLE,
    "length": [*HEAD, *OPEN, *TEXT, StepDone(0, "chat", "length"), *CLOSE, Completed("length")],
    "failed": [*HEAD, *OPEN, *TEXT, *CLOSE, Failed("engine_failed", "It broke.", True, 1.5)],
    "refused": [*HEAD, Usage(0, 0), Failed("overloaded", "Full.", True, 2.0, "input")],
    "stopped": [*HEAD, *OPEN, *TEXT, *CLOSE, Stopped(5, 59, 12.5)],
    "logprobs": [HEAD[0], *OPEN, TextDelta("水", (TOKEN,)), *CLOSE, Completed()],
    "queued": [
        HEAD[0],
        Queued(2, None),
        Queued(1, 1.5),
        Queued(0, 0.0),
        *HEAD[1:],
        *OPEN,
        *TEXT,
        STEP,
        *CLOSE,
        Completed(),
    ],
    "empty": [*HEAD, STEP, Usage(3, 0), Completed()],
}


def encoder(fields: ResponseFields = FIELDS) -> ResponseEncoder:
    return ResponseEncoder(RUN, 1_700_000_000.25, fields, background=True)


def blocks(events: list[Event]) -> list[bytes]:
    coder = encoder()
    return [coder.encode(number, event) for number, event in enumerate(events)]


def data(block: bytes) -> dict[str, object]:
    value: dict[str, object] = json.loads(block.decode().split("\n")[2].removeprefix("data: "))
    return value


@pytest.mark.parametrize("name", STORIES)
def test_each_event_is_one_block_with_its_own_number(name: str) -> None:
    for number, block in enumerate(blocks(STORIES[name])):
        first, second, third, *rest = block.split(b"\n")
        assert first == b"id: %d" % number
        assert rest == [b"", b""]
        assert third.startswith(b"data: {")
        told = data(block)
        assert told["sequence_number"] == number
        assert second == f"event: {told['type']}".encode()
        assert "error" not in told


@pytest.mark.parametrize("name", STORIES)
def test_stock_events_have_every_field_of_their_types(name: str) -> None:
    for event, block in zip(STORIES[name], blocks(STORIES[name]), strict=True):
        told = data(block)
        kind = str(told["type"])
        if kind.startswith("onebox."):
            assert kind == f"onebox.{event.kind}"
        else:
            MODELS[kind].model_validate(told, strict=True)


@pytest.mark.parametrize("name", STORIES)
def test_client_reads_back_the_very_events(name: str) -> None:
    told = [response_event(data(block)) for block in blocks(STORIES[name])]
    assert told == list(enumerate(STORIES[name]))


@pytest.mark.parametrize("name", STORIES)
def test_reader_who_skips_gets_the_same_bytes(name: str) -> None:
    events = STORIES[name]
    whole = blocks(events)
    for after in range(len(events)):
        coder = encoder()
        for event in events[: after + 1]:
            coder.note(event)
        rest = [coder.encode(number, events[number]) for number in range(after + 1, len(events))]
        assert rest == whole[after + 1 :]


@pytest.mark.parametrize(
    ("name", "status", "item_status"),
    [
        ("completed", "completed", "completed"),
        ("length", "incomplete", "incomplete"),
        ("failed", "failed", "incomplete"),
        ("stopped", "cancelled", "incomplete"),
        ("logprobs", "completed", "completed"),
    ],
)
def test_end_has_the_whole_text_usage_and_status(name: str, status: str, item_status: str) -> None:
    told = [data(block) for block in blocks(STORIES[name])]
    text = "".join(event.text for event in STORIES[name] if isinstance(event, TextDelta))
    response = Response.model_validate(told[-1]["response"])
    assert response.status == status
    assert response.output_text == text
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (12, 5, 17)
    assert (response.incomplete_details is not None) == (status == "incomplete")
    done = [value for value in told if value["type"] == "response.output_item.done"]
    item = ResponseOutputItemDoneEvent.model_validate(done[0]).item
    assert item == response.output[0]
    assert item.type == "message"
    assert item.status == item_status
    assert [value["text"] for value in told if value["type"] == "response.output_text.done"] == [text]


def test_response_repeats_what_was_asked() -> None:
    coder = encoder()
    for event in WHOLE:
        coder.note(event)
    response = Response.model_validate(coder.response())
    assert response.id == RUN
    assert response.created_at == 1_700_000_000
    assert (response.model, response.instructions, response.max_output_tokens) == ("chat", "Be brief.", 64)
    assert (response.temperature, response.top_p, response.metadata) == (0.5, 0.9, {"who": "me"})
    assert response.background is True
    assert response.conversation is not None
    assert response.conversation.id == "conv_1"


def test_running_response_has_its_text_so_far() -> None:
    coder = encoder()
    for event in [*HEAD, *OPEN, TEXT[0]]:
        coder.note(event)
    response = Response.model_validate(coder.response())
    assert (response.status, response.output_text, response.usage) == ("in_progress", "Hello,\n", None)
    assert response.output[0].type == "message"
    assert response.output[0].status == "in_progress"


def test_failure_names_its_cause_in_both_vocabularies() -> None:
    response = Response.model_validate(data(blocks(STORIES["refused"])[-1])["response"])
    assert response.error is not None
    assert (response.error.code, response.error.type, response.error.param) == (
        "rate_limit_exceeded",
        "overloaded",
        "input",
    )
    assert response.output == []


def test_stock_accumulator_ends_with_the_text() -> None:
    state: ResponseStreamState[object] = ResponseStreamState(input_tools=omit, text_format=omit)
    for block in blocks(WHOLE):
        told = data(block)
        model = MODELS.get(str(told["type"]))
        if model is not None:
            state.handle_event(model.model_validate(told))  # type: ignore[arg-type]  # one of the union's members
    assert state._completed_response is not None
    assert state._completed_response.output_text == 'Hello,\n "wörld" 水\u2028!'


def test_fields_survive_being_kept_with_the_run() -> None:
    assert fields_of(json.loads(json.dumps(FIELDS.to_extra())), "auto") == FIELDS
    assert fields_of({}, "write") == ResponseFields("write")
