"""The bytes of an OpenAI response: each event of a run is one server-sent event with the same number.

Pure: it is fed a run's events from 0 and keeps what later ones repeat (the text, the usage), so the same log gives the
same bytes to whoever reads it, whenever. Chat's lines are in `agents.wire`; HTTP is `agents.api.responses`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

import orjson
from pydantic import JsonValue, TypeAdapter

from agents.wire import token_logprob
from onebox.events import (
    Accepted,
    Completed,
    Event,
    Failed,
    Output,
    Replanned,
    Routed,
    StepDone,
    StepStarted,
    Stopped,
    TextDelta,
    Token,
    Usage,
    encode,
)
from onebox.plans import replan

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
OutputStage = Literal["item_added", "part_added", "text_done", "part_done", "item_done"]
OUTPUT_TYPES: Final[dict[OutputStage, str]] = {
    "item_added": "response.output_item.added",
    "part_added": "response.content_part.added",
    "text_done": "response.output_text.done",
    "part_done": "response.content_part.done",
    "item_done": "response.output_item.done",
}
# OpenAI's codes for a failed response are a closed set; ours stands beside it as `type`.
_ERROR_CODES: Final = {
    "overloaded": "rate_limit_exceeded",
    "rate_limited": "rate_limit_exceeded",
    "context_length_exceeded": "invalid_prompt",
}


@dataclass(frozen=True, slots=True)
class ResponseFields:
    """What the caller asked for, as every response object repeats it."""

    model: str = "auto"
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    store: bool = True

    def to_extra(self) -> dict[str, JsonValue]:
        """The fields as a run keeps them."""
        return asdict(self)


def fields_of(extra: Mapping[str, object], model: str) -> ResponseFields:
    """The fields that a run keeps; a run of another API has none, and `model` is its model."""
    return _FIELDS.validate_python({"model": model, **extra})


_FIELDS: Final = TypeAdapter(ResponseFields)


class ResponseEncoder:
    """Encodes one run. Give it every event in order, to `encode` or, where its bytes are not wanted, to `note`.

    `streamed`: log-probabilities are in the deltas alone, for to repeat them each reader would have to keep them all.
    """

    def __init__(
        self, run_id: str, created: float, fields: ResponseFields, *, background: bool = False, streamed: bool = False
    ) -> None:
        self._streamed = streamed
        self._item_id = f"msg_{run_id.removeprefix('resp_')}"
        self._place = b'"item_id":"%b","output_index":0,"content_index":0' % self._item_id.encode()
        self._delta_head = (
            b"\nevent: response.output_text.delta\n"
            b'data: {"type":"response.output_text.delta",' + self._place + b',"logprobs":[],"delta":'
        )
        self._constant = {
            "id": run_id,
            "object": "response",
            "created_at": int(created),
            "model": fields.model,
            "background": background,
            "instructions": fields.instructions,
            "previous_response_id": fields.previous_response_id,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": None,
            "temperature": fields.temperature,
            "top_p": fields.top_p,
            "top_logprobs": fields.top_logprobs,
            "metadata": fields.metadata or {},
            "store": fields.store,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
            "user": None,
        }
        self._accepted: Accepted | None = None
        self._routed: Routed | None = None
        self._pieces: list[str] = []
        self._tokens: list[Token] = []
        self._stage: OutputStage | None = None
        self._open_steps = 0
        self._cut = False
        self._usage: Usage | None = None
        self._terminal: Completed | Failed | Stopped | None = None

    @property
    def terminal(self) -> Completed | Failed | Stopped | None:
        """The run's end, once it was given."""
        return self._terminal

    @property
    def text(self) -> str:
        """The reply so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def note(self, event: Event) -> None:
        """Take an event in without its bytes."""
        if isinstance(event, TextDelta):
            self._pieces.append(event.text)
            if not self._streamed:
                self._tokens.extend(event.tokens)
        elif isinstance(event, Output):
            self._stage = event.stage
        elif isinstance(event, Accepted):
            self._accepted = event
        elif isinstance(event, Routed):
            self._routed = event
        elif isinstance(event, Replanned) and self._routed is not None:
            self._routed = replan(self._routed, event)
        elif isinstance(event, StepStarted):
            self._open_steps += 1
        elif isinstance(event, StepDone):
            self._open_steps -= 1
            self._cut = event.finish == "length"
        elif isinstance(event, Usage):
            self._usage = event
        elif isinstance(event, Completed | Failed | Stopped):
            self._terminal = event

    def encode(self, number: int, event: Event) -> bytes:
        """The event as one block of the stream."""
        if type(event) is TextDelta and not event.tokens:
            self._pieces.append(event.text)
            return b'id: %d%b%b,"sequence_number":%d}\n\n' % (
                number,
                self._delta_head,
                orjson.dumps(event.text),
                number,
            )
        self.note(event)
        kind, body = self._body(event)
        name = kind.encode()
        return b'id: %d\nevent: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (
            number,
            name,
            name,
            number,
            body,
        )

    def response(self) -> dict[str, object]:
        """The response object as of the last event."""
        terminal, accepted = self._terminal, self._accepted
        conversation = accepted.conversation_id if accepted is not None else None
        return self._constant | {
            "status": self._status(),
            "error": _error(terminal) if isinstance(terminal, Failed) else None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status() == "incomplete" else None,
            "output": [self._item(self._item_status())] if self._stage is not None else [],
            "usage": _usage(self._usage) if self._usage is not None else None,
            "conversation": {"id": conversation} if conversation is not None else None,
            "onebox": {
                "turn": accepted.turn_id if accepted is not None else None,
                "route": self._routed,
                "event": terminal,
            },
        }

    def _body(self, event: Event) -> tuple[str, bytes]:
        """The type of the event on the wire, and its fields but for type and number."""
        if isinstance(event, TextDelta):
            logprobs = orjson.dumps([token_logprob(token) for token in event.tokens])
            delta = b'"logprobs":' + logprobs + b',"delta":' + orjson.dumps(event.text)
            # OpenAI's shape has no token ids; the event itself has them.
            return "response.output_text.delta", b"%b,%b,%b" % (self._place, delta, _own(event))
        if isinstance(event, Output):
            return OUTPUT_TYPES[event.stage], self._output(event)
        if isinstance(event, Accepted):
            return "response.created", self._whole(event)
        if isinstance(event, Completed):
            kind = "response.incomplete" if event.finish == "length" else "response.completed"
            return kind, self._whole(event)
        if isinstance(event, Failed):
            return "response.failed", self._whole(event)
        if isinstance(event, Stopped):
            # OpenAI has no event for a cancelled response; the status inside says it.
            return "response.incomplete", self._whole(event)
        return f"onebox.{event.kind}", b'"event":' + encode(event)

    def _output(self, event: Output) -> bytes:
        if event.stage == "item_added":
            return b'"output_index":0,"item":' + orjson.dumps(self._item("in_progress") | {"content": []})
        if event.stage == "item_done":
            return b'"output_index":0,"item":' + orjson.dumps(self._item(self._item_status()))
        if event.stage == "text_done":
            logprobs = orjson.dumps([token_logprob(token) for token in self._tokens])
            return b'%b,"logprobs":%b,"text":%b' % (self._place, logprobs, orjson.dumps(self.text))
        part = self._part() if event.stage == "part_done" else self._part() | {"text": "", "logprobs": []}
        return self._place + b',"part":' + orjson.dumps(part)

    def _whole(self, event: Event) -> bytes:
        return b'"response":%b,%b' % (orjson.dumps(self.response()), _own(event))

    def _item(self, status: str) -> dict[str, object]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> dict[str, object]:
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": [token_logprob(token) for token in self._tokens],
        }

    def _status(self) -> Status:
        match self._terminal:
            case None:
                return "in_progress"
            case Completed(finish="length"):
                return "incomplete"
            case Completed():
                return "completed"
            case Failed():
                return "failed"
            case Stopped():
                return "cancelled"

    def _item_status(self) -> str:
        """Between the item's end and the run's, whether the item is whole shows only in its steps."""
        if self._terminal is not None:
            return "completed" if self._status() == "completed" else "incomplete"
        if self._stage != "item_done":
            return "in_progress"
        return "incomplete" if self._cut or self._open_steps else "completed"


def _own(event: Event) -> bytes:
    return b'"onebox":{"event":' + encode(event) + b"}"


def _error(failed: Failed) -> dict[str, object]:
    code = _ERROR_CODES.get(failed.code, "server_error")
    return {"code": code, "message": failed.message, "param": failed.param, "type": failed.code}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
