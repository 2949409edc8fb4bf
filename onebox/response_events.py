"""Reads the events of an OpenAI response stream back into the run's own events.

The twin that writes them is `agents.responses_wire`; who fetches them is `onebox.client`.
"""

from collections.abc import Mapping
from typing import Final

from pydantic import JsonValue, TypeAdapter, ValidationError

from onebox.errors import Internal
from onebox.events import Event, Output, TextDelta, decode

_OUTPUTS: Final[dict[str, Output]] = {
    "response.output_item.added": Output("item_added"),
    "response.content_part.added": Output("part_added"),
    "response.output_text.done": Output("text_done"),
    "response.content_part.done": Output("part_done"),
    "response.output_item.done": Output("item_done"),
}
_OBJECT: Final[TypeAdapter[JsonValue]] = TypeAdapter(JsonValue)


def response_event(data: Mapping[str, JsonValue]) -> tuple[int, Event]:
    """The number and the event in one `data:` object of the stream.

    Raises:
        Internal: it is no event of this API.
    """
    kind, number = data.get("type"), data.get("sequence_number")
    if not isinstance(kind, str) or not isinstance(number, int):
        raise Internal("The API sent an event without type or number. Is something else listening on its address?")
    if (output := _OUTPUTS.get(kind)) is not None:
        return number, output
    own = data.get("onebox")
    event = data.get("event") if own is None else own.get("event") if isinstance(own, dict) else None
    delta = data.get("delta")
    if event is None and kind == "response.output_text.delta" and isinstance(delta, str):
        return number, TextDelta(delta)
    return number, own_event(event)


def own_event(value: JsonValue) -> Event:
    """The run's event in an `event` field.

    Raises:
        Internal: it is none.
    """
    try:
        return decode(_OBJECT.dump_json(value))
    except ValidationError as error:
        raise Internal("The API sent an event that this client does not know. Update the client.") from error
