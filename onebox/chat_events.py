"""Reads the chunks of an OpenAI chat stream back into the run's own events.

The twin that writes them is `agents.wire`; who fetches them is `onebox.client`.
"""

from collections.abc import AsyncIterator
from typing import Literal

from pydantic import JsonValue, TypeAdapter

from onebox.events import Accepted, Completed, Event, Failed, Routed, TextDelta, Usage, decode

_OBJECT: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])
_ROUTED: TypeAdapter[Routed] = TypeAdapter(Routed)
_USAGE: TypeAdapter[Usage] = TypeAdapter(Usage)


async def chat_events(lines: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """The events in the `data:` payloads of a stream; one that breaks off ends in `Failed`."""
    finish: Literal["stop", "length"] = "stop"
    async for line in lines:
        if line == b"[DONE]":
            yield Completed(finish)
            return
        chunk = _OBJECT.validate_json(line)
        error = chunk.get("error")
        if isinstance(error, dict):
            yield Failed(str(error.get("code")), str(error.get("message")), bool(error.get("retryable")))
            return
        extra = chunk.get("onebox")
        if isinstance(extra, dict):
            for event in _extra_events(extra):
                yield event
        for choice in _items(chunk.get("choices")):
            delta = choice.get("delta")
            if isinstance(delta, dict) and isinstance(text := delta.get("content"), str) and text:
                yield TextDelta(text)
            if choice.get("finish_reason") == "length":
                finish = "length"
        if isinstance(usage := chunk.get("usage"), dict):
            yield _USAGE.validate_python(usage)
    yield Failed("engine_failed", "The reply broke off before its end. Ask for it again.", True)


def _items(value: JsonValue) -> list[dict[str, JsonValue]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _extra_events(extra: dict[str, JsonValue]) -> list[Event]:
    events: list[Event] = []
    if isinstance(run_id := extra.get("run_id"), str):
        conversation = extra.get("conversation")
        events.append(Accepted(run_id, conversation if isinstance(conversation, str) else None))
    if isinstance(route := extra.get("route"), dict):
        events.append(_ROUTED.validate_python(route))
    if isinstance(event := extra.get("event"), dict):
        decoded = decode(_OBJECT.dump_json(event))
        if not isinstance(decoded, Accepted | Routed | TextDelta | Usage | Completed):
            events.append(decoded)
    return events
