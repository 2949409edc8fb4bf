"""What the API answers, as values or as the error it tells of; anything else is an `Internal` error."""

from collections.abc import Callable
from typing import Final, TypeVar

import httpx
from pydantic import JsonValue, TypeAdapter, ValidationError

from onebox.errors import Internal, OneboxError, from_code

T = TypeVar("T")
_OBJECT: Final[TypeAdapter[dict[str, JsonValue]]] = TypeAdapter(dict[str, JsonValue])


def validated(read: Callable[[JsonValue], T], value: JsonValue) -> T:
    """The value that `read`, which raises `pydantic.ValidationError`, makes of an answer."""
    try:
        return read(value)
    except ValidationError as error:
        raise Internal("The API's answer is not of the form this client knows. Use one version of both.") from error


def parsed(content: bytes) -> dict[str, JsonValue]:
    """The JSON object of an answer's body."""
    try:
        return _OBJECT.validate_json(content)
    except ValidationError as error:
        raise Internal("The API's answer is not a JSON object. Is something else listening on its address?") from error


def error_of(response: httpx.Response, content: bytes) -> OneboxError:
    """The error that an answer with a status of 400 or more tells of."""
    try:
        error = _OBJECT.validate_json(content).get("error")
    except ValidationError:
        error = None
    if not isinstance(error, dict):
        return Internal(f"The API answered {response.status_code} without saying why. Its log has the cause.")
    retry_after = response.headers.get("retry-after", "")
    found = from_code(
        str(error.get("code")),
        str(error.get("message")),
        retry_after_s=float(retry_after) if retry_after.isdigit() else None,
    )
    param = error.get("param")
    found.param = param if isinstance(param, str) else None
    return found
