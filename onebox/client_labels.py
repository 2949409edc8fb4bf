"""The client's part for labels, `Client.labels`: what was learned from corrections, and whether to learn at all."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol
from urllib.parse import quote

import httpx
from pydantic import JsonValue, TypeAdapter

from onebox.answers import validated
from onebox.labels import LabelPage, LabelScope, LabelState, Learning
from onebox.messages import Message

_LEARNING: Final[TypeAdapter[Learning]] = TypeAdapter(Learning)


class Call(Protocol):
    """One request whose answer is a JSON object."""

    async def __call__(
        self,
        method: str,
        path: str,
        body: Mapping[str, JsonValue] | None = None,
        *,
        query: Mapping[str, str | None] | None = None,
    ) -> dict[str, JsonValue]:
        """The answer."""
        ...


class Open(Protocol):
    """One request whose answer is read by the caller."""

    def __call__(self, method: str, path: str) -> AbstractAsyncContextManager[httpx.Response]:
        """The answer, open."""
        ...


class LabelCalls:
    """Methods for labels. They raise `OneboxError`s as the client's own do."""

    def __init__(self, call: Call, open_: Open) -> None:
        self._call = call
        self._open = open_

    async def page(self, *, limit: int = 50, cursor: str | None = None) -> LabelPage:
        """The newest labels first, one page of them."""
        wanted = {"limit": str(limit), "cursor": cursor}
        found = await self._call("GET", "/v1/labels", query={name: v for name, v in wanted.items() if v})
        rows, following = found.get("data"), found.get("next")
        data = tuple(validated(LabelState.from_json, row) for row in rows) if isinstance(rows, list) else ()
        return LabelPage(data, following if isinstance(following, str) else None)

    async def add(
        self, messages: Sequence[Message], plan: Sequence[str], *, scope: LabelScope | None = None
    ) -> LabelState:
        """Say which tasks, in order, are right for the last message; again, and it replaces what was said before.

        Raises:
            Conflict: learning is off, or not for everybody.
        """
        body: dict[str, JsonValue] = {
            "messages": [{"role": message.role, "content": message.text} for message in messages],
            "plan": list(plan),
        }
        if scope is not None:
            body["scope"] = scope
        return validated(LabelState.from_json, await self._call("POST", "/v1/labels", body))

    async def undo(self, label_id: str) -> None:
        """Undo a label: the router decides as if it had never been there.

        Raises:
            NotFound: there is none.
        """
        await self._call("DELETE", f"/v1/labels/{quote(label_id, safe='')}")

    async def export(self) -> bytes:
        """All labels as lines of JSON, in the form of the router's own data."""
        async with self._open("GET", "/v1/labels/export") as response:
            return await response.aread()

    async def learning(self) -> Learning:
        """What is learned from corrections: nothing ("off"), for this tenant alone, or for everybody ("global")."""
        found = await self._call("GET", "/v1/labels/learning")
        return validated(_LEARNING.validate_python, found.get("learning"))

    async def set_learning(self, learning: Learning) -> None:
        """Choose what is learned; with "off" the labels stay and are not used."""
        await self._call("PUT", "/v1/labels/learning", {"learning": learning})
