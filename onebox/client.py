"""The async client of the public API: what an app, the page and the command line use.

It speaks HTTP and nothing else; errors come out as `onebox.errors`, replies as `onebox.events`. The server's side is
`agents.api`; the shapes of a stored conversation are in `onebox.records`.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import JsonValue, TypeAdapter, ValidationError

from onebox.errors import EngineFailed, Internal, OneboxError, Timeout, Unavailable, from_code
from onebox.events import Accepted, Completed, Event, Failed, Routed, TextDelta, Usage, decode
from onebox.messages import Message
from onebox.records import Conversation, ConversationPage, Readiness, Reply, TaskInfo, TaskResult

T = TypeVar("T")
Feedback = Literal["like", "dislike"]
ExportFormat = Literal["json", "markdown"]

_OBJECT: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])
_ROUTED: TypeAdapter[Routed] = TypeAdapter(Routed)
_USAGE: TypeAdapter[Usage] = TypeAdapter(Usage)
_CONVERSATION: TypeAdapter[Conversation] = TypeAdapter(Conversation)
_PAGE: TypeAdapter[ConversationPage] = TypeAdapter(ConversationPage)
_READINESS: TypeAdapter[Readiness] = TypeAdapter(Readiness)
_RESULT: TypeAdapter[TaskResult] = TypeAdapter(TaskResult)
_TASKS: TypeAdapter[list[TaskInfo]] = TypeAdapter(list[TaskInfo])


class Client:
    """One pool of connections to one gateway. Use it as an async context manager, or call `aclose`.

    Every method raises `OneboxError`s: those the gateway names, `Unavailable` where it does not answer, `Timeout`
    where it is silent for `read_timeout_s`.
    """

    def __init__(
        self, base_url: str, api_key: str, *, connect_timeout_s: float = 2.0, read_timeout_s: float = 120.0
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        model: str = "auto",
        conversation: str | None = None,
        regenerate: bool = False,
        edit: str | None = None,
        params: Mapping[str, JsonValue] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> AsyncGenerator[Event, None]:
        """The reply as events: `Accepted`, `Routed`, then what the run yields, then one terminal event.

        Close the iterator early (`aclosing`) and the gateway stops the engine. A reply that breaks off after its
        first byte ends in `Failed`; before it, the error is raised.
        """
        body = _chat_body(
            messages, model, conversation, regenerate, edit, params or {}, max_tokens, temperature, seed, stream=True
        )
        async with (
            self._open("POST", "/v1/chat/completions", body) as response,
            aclosing(_sse_data(response)) as lines,
        ):
            async for event in _chat_events(lines):
                yield event

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str = "auto",
        conversation: str | None = None,
        params: Mapping[str, JsonValue] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Reply:
        """The whole reply at once."""
        body = _chat_body(
            messages, model, conversation, False, None, params or {}, max_tokens, temperature, seed, stream=False
        )
        data = await self._call("POST", "/v1/chat/completions", body)
        return Reply.from_wire(data)

    async def tasks(self) -> list[TaskInfo]:
        """The tasks this box can do, with titles, examples and parameters."""
        data = await self._call("GET", "/v1/tasks")
        return _validated(_TASKS, data.get("data"))

    async def run_task(
        self, name: str, text: str, params: Mapping[str, JsonValue] | None = None, *, max_tokens: int | None = None
    ) -> TaskResult:
        """The result of one task on one text."""
        body: dict[str, JsonValue] = {"text": text, "params": dict(params or {})}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        return _validated(_RESULT, await self._call("POST", f"/v1/tasks/{quote(name, safe='')}", body))

    async def route(self, text: str) -> Routed:
        """The router's decision on `text`, without the work."""
        return _validated(_ROUTED, await self._call("POST", "/v1/route", {"text": text}))

    async def conversations(
        self, *, limit: int = 50, cursor: str | None = None, query: str | None = None
    ) -> ConversationPage:
        """The newest conversations first, one page of them."""
        wanted = {"limit": str(limit), "cursor": cursor, "q": query}
        found = await self._call("GET", "/v1/conversations", query={k: v for k, v in wanted.items() if v})
        return _validated(_PAGE, found)

    async def create_conversation(self, title: str | None = None) -> str:
        """The id of a new, empty conversation."""
        data = await self._call("POST", "/v1/conversations", {"title": title} if title else {})
        return str(data["id"])

    async def conversation(self, conversation_id: str) -> Conversation:
        """A conversation with all its turns and variants."""
        return _validated(_CONVERSATION, await self._call("GET", _conversation_path(conversation_id)))

    async def rename_conversation(self, conversation_id: str, title: str) -> None:
        """Give a conversation another title."""
        await self._call("PATCH", _conversation_path(conversation_id), {"title": title})

    async def delete_conversation(self, conversation_id: str) -> None:
        """Remove a conversation for good."""
        await self._call("DELETE", _conversation_path(conversation_id))

    async def export_conversation(self, conversation_id: str, fmt: ExportFormat = "json") -> bytes:
        """A conversation as a file."""
        path = f"{_conversation_path(conversation_id)}/export?format={fmt}"
        async with self._open("GET", path) as response:
            return await response.aread()

    async def feedback(self, conversation_id: str, run_id: str, value: Feedback | None) -> None:
        """Like or dislike a reply; None takes it back."""
        await self._call("POST", "/v1/feedback", {"conversation": conversation_id, "run_id": run_id, "value": value})

    async def readiness(self) -> Readiness:
        """Whether a token can be had now, and if not, what is missing. Never raises for 503."""
        try:
            response = await self._http.get("/readyz", timeout=5.0)
        except httpx.TransportError:
            return Readiness(ready=False, store="unknown", engine="unknown", detail="The API does not answer.")
        return _validated(_READINESS, _parsed(response.content))

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, JsonValue] | None = None,
        *,
        query: Mapping[str, str | None] | None = None,
    ) -> dict[str, JsonValue]:
        async with self._open(method, path, body, query) as response:
            content = await response.aread()
            return _parsed(content) if content else {}

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        body: Mapping[str, JsonValue] | None = None,
        query: Mapping[str, str | None] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        try:
            async with self._http.stream(method, path, json=body, params=query or None) as response:
                if response.status_code >= 400:
                    raise _error_of(response, await response.aread())
                yield response
        except httpx.TimeoutException as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise _unreachable(self._http.base_url) from error
            raise Timeout("The API was silent for too long, so the request was given up. Send it again.") from error
        except httpx.ConnectError as error:
            raise _unreachable(self._http.base_url) from error
        except httpx.TransportError as error:
            raise EngineFailed("The connection to the API broke off. Send the request again.") from error


def _conversation_path(conversation_id: str) -> str:
    return f"/v1/conversations/{quote(conversation_id, safe='')}"


def _unreachable(base_url: httpx.URL) -> Unavailable:
    return Unavailable(f"The API at {base_url} does not answer; it may still be starting. Try again in a moment.")


def _validated(adapter: TypeAdapter[T], value: JsonValue) -> T:
    return adapter.validate_python(value)


def _parsed(content: bytes) -> dict[str, JsonValue]:
    try:
        return _OBJECT.validate_json(content)
    except ValidationError as error:
        raise Internal("The API's answer is not a JSON object. Is something else listening on its address?") from error


def _error_of(response: httpx.Response, content: bytes) -> OneboxError:
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


def _chat_body(
    messages: Sequence[Message],
    model: str,
    conversation: str | None,
    regenerate: bool,
    edit: str | None,
    params: Mapping[str, JsonValue],
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    *,
    stream: bool,
) -> dict[str, JsonValue]:
    onebox: dict[str, JsonValue] = {"conversation": conversation, "regenerate": regenerate, "events": stream}
    if edit is not None:
        onebox["edit"] = edit
    if params:
        onebox["params"] = dict(params)
    body: dict[str, JsonValue] = {
        "model": model,
        "messages": [{"role": message.role, "content": message.text} for message in messages],
        "stream": stream,
        "onebox": onebox,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    for name, value in (("max_tokens", max_tokens), ("temperature", temperature), ("seed", seed)):
        if value is not None:
            body[name] = value
    return body


async def _sse_data(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The `data:` payloads of a stream of server-sent events."""
    rest = b""
    async for chunk in response.aiter_raw():
        *blocks, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for block in blocks:
            data = [line[5:].lstrip() for line in block.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield b"\n".join(data)


async def _chat_events(lines: AsyncIterator[bytes]) -> AsyncIterator[Event]:
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
