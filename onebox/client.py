"""The async client of the public API: what an app, the page and the command line use.

It speaks HTTP and nothing else; errors come out as `onebox.errors`, replies as `onebox.events`. The server's side is
`agents.api`; the shapes of a stored conversation are in `onebox.records`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Final, Literal, Self
from urllib.parse import quote
from uuid import uuid4

import httpx
from pydantic import JsonValue, TypeAdapter

from onebox.answers import error_of, parsed, validated
from onebox.capabilities import Capabilities
from onebox.chat_events import chat_events
from onebox.client_labels import LabelCalls
from onebox.errors import EngineFailed, Internal, ModelLoading, OneboxError, Timeout, Unavailable, from_code
from onebox.events import (
    Completed,
    Event,
    Failed,
    Routed,
    Stopped,
    Terminal,
    is_terminal,
)
from onebox.messages import Message
from onebox.records import Conversation, ConversationPage, Readiness, Reply, StartedRun, TaskInfo, TaskResult
from onebox.response_events import own_event, response_event
from onebox.sse import NOTHING_LEFT, sse_data

Feedback = Literal["like", "dislike"]
ExportFormat = Literal["json", "markdown"]
START_PAUSES_S: Final = (0.1, 0.5, 1.0)
FOLLOW_PAUSES_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
# A living stream of events is never silent for longer than the server's `ping_s`, 15 s by default.
FOLLOW_SILENCE_S: Final = 40.0

_ROUTED: TypeAdapter[Routed] = TypeAdapter(Routed)
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
        self.labels = LabelCalls(self._call, self._open)

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
            aclosing(sse_data(response)) as lines,
        ):
            async for event in chat_events(lines):
                yield event

    async def start(
        self,
        messages: Sequence[Message],
        *,
        model: str = "auto",
        conversation: str | None = None,
        regenerate: bool = False,
        edit: str | None = None,
        previous: str | None = None,
        plan: Sequence[str] = (),
        params: Mapping[str, JsonValue] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        idempotency_key: str | None = None,
    ) -> StartedRun:
        """A reply that is written whether anybody reads it or not; `follow` it by its run id.

        `previous` is the run that this one goes on from; `plan` names the tasks of its steps. A start whose answer is
        lost is sent again under the same idempotency key, so there is never a second run; without a key of yours each
        call makes one.
        """
        onebox: dict[str, JsonValue] = {"regenerate": regenerate, "params": dict(params or {})}
        if edit is not None:
            onebox["edit"] = edit
        if plan:
            onebox["plan"] = list(plan)
        body: dict[str, JsonValue] = {
            "model": model,
            "input": [{"role": message.role, "content": message.text} for message in messages],
            "background": True,
            "onebox": onebox,
        }
        optional: dict[str, JsonValue] = {
            "conversation": conversation,
            "previous_response_id": previous,
            "max_output_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        for pause_s in (*START_PAUSES_S, None):
            try:
                return StartedRun.from_wire(await self._call("POST", "/v1/responses", body, headers=headers))
            except ModelLoading:
                raise
            except (EngineFailed, Timeout, Unavailable):
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def follow(
        self, run_id: str, after: int = -1, *, patience_s: float = 60.0
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """The run's events numbered above `after`, each with its number, up to its terminal event.

        A connection that breaks is opened again behind the last event, so none is missed and none comes twice. Closing
        the iterator leaves the run alone.

        Raises:
            UnknownRun: there is no such run.
            Unavailable: nothing could be read for `patience_s`; the run may go on.
        """
        lost_since: float | None = None
        tries = 0
        while True:
            try:
                async with aclosing(self._events_after(run_id, after)) as events:
                    async for number, event in events:
                        lost_since, tries, after = None, 0, number
                        yield number, event
                        if is_terminal(event):
                            return
                return
            except OneboxError as error:
                if not error.retryable:
                    raise
                cause = error
            now = time.monotonic()
            lost_since = lost_since if lost_since is not None else now
            if now - lost_since > patience_s:
                raise Unavailable(
                    f"Run {run_id!r} could not be read for {patience_s:g} s; it may still go on. "
                    f"Follow it again behind event {after}."
                ) from cause
            await asyncio.sleep(FOLLOW_PAUSES_S[min(tries, len(FOLLOW_PAUSES_S) - 1)])
            tries += 1

    async def cancel(self, run_id: str) -> Terminal:
        """Stop a run; its terminal event, which is the receipt if it had not ended before."""
        data = await self._call("POST", f"{_run_path(run_id)}/cancel")
        extra = data.get("onebox")
        event = own_event(extra.get("event") if isinstance(extra, dict) else None)
        if not isinstance(event, Completed | Failed | Stopped):
            raise Internal(
                "The API says that the run was cancelled and does not say how it ended. Its log has the cause."
            )
        return event

    async def replan(self, run_id: str, plan: Sequence[str]) -> None:
        """Let a run go on with another plan: task names in order, of which those that have begun stay first.

        Raises:
            Conflict: its last step has begun, or the plan changes one that has.
        """
        await self._call("PUT", f"{_run_path(run_id)}/plan", {"plan": list(plan)})

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
        return validated(_TASKS.validate_python, data.get("data"))

    async def run_task(
        self, name: str, text: str, params: Mapping[str, JsonValue] | None = None, *, max_tokens: int | None = None
    ) -> TaskResult:
        """The result of one task on one text."""
        body: dict[str, JsonValue] = {"text": text, "params": dict(params or {})}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        return validated(_RESULT.validate_python, await self._call("POST", f"/v1/tasks/{quote(name, safe='')}", body))

    async def capabilities(self) -> Capabilities:
        """What the box can do now, how well and how fast, and what it cannot."""
        return validated(Capabilities.from_json, await self._call("GET", "/v1/capabilities"))

    async def route(self, text: str) -> Routed:
        """The router's decision on `text`, without the work."""
        return validated(_ROUTED.validate_python, await self._call("POST", "/v1/route", {"text": text}))

    async def conversations(
        self, *, limit: int = 50, cursor: str | None = None, query: str | None = None
    ) -> ConversationPage:
        """The newest conversations first, one page of them."""
        wanted = {"limit": str(limit), "cursor": cursor, "q": query}
        found = await self._call("GET", "/v1/conversations", query={k: v for k, v in wanted.items() if v})
        return validated(_PAGE.validate_python, found)

    async def create_conversation(self, title: str | None = None) -> str:
        """The id of a new, empty conversation."""
        data = await self._call("POST", "/v1/conversations", {"title": title} if title else {})
        return str(data["id"])

    async def conversation(self, conversation_id: str) -> Conversation:
        """A conversation with all its turns and variants."""
        return validated(_CONVERSATION.validate_python, await self._call("GET", _conversation_path(conversation_id)))

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
        return validated(_READINESS.validate_python, parsed(response.content))

    async def _events_after(self, run_id: str, after: int) -> AsyncGenerator[tuple[int, Event], None]:
        """What one connection gives; it raises where the stream breaks off, and returns where nothing is left."""
        query: dict[str, str | None] = {"stream": "true"}
        if after >= 0:
            query["starting_after"] = str(after)
        async with (
            self._open("GET", _run_path(run_id), query=query, silence_s=FOLLOW_SILENCE_S) as response,
            aclosing(sse_data(response)) as payloads,
        ):
            async for payload in payloads:
                if payload == NOTHING_LEFT:
                    return
                data = parsed(payload)
                if isinstance(error := data.get("error"), dict):
                    raise from_code(str(error.get("code")), str(error.get("message")))
                number, event = response_event(data)
                yield number, event
                if is_terminal(event):
                    return
        raise EngineFailed("The stream of the run broke off. Follow it again.")

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, JsonValue] | None = None,
        *,
        query: Mapping[str, str | None] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, JsonValue]:
        async with self._open(method, path, body, query, headers) as response:
            content = await response.aread()
            return parsed(content) if content else {}

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        body: Mapping[str, JsonValue] | None = None,
        query: Mapping[str, str | None] | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
    ) -> AsyncIterator[httpx.Response]:
        usual = self._http.timeout
        timeout = httpx.Timeout(silence_s or usual.read, connect=usual.connect, pool=None)
        try:
            async with self._http.stream(
                method, path, json=body, params=query or None, headers=headers, timeout=timeout
            ) as response:
                if response.status_code >= 400:
                    raise error_of(response, await response.aread())
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


def _run_path(run_id: str) -> str:
    return f"/v1/responses/{quote(run_id, safe='')}"


def _unreachable(base_url: httpx.URL) -> Unavailable:
    return Unavailable(f"The API at {base_url} does not answer; it may still be starting. Try again in a moment.")


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
