"""The metrics of all replicas as one page, each series with the replica and the model it is of.

A replica shows its own only to who has the internal token, at a door that comes and goes; this page is at one address.
It is for up to some hundred replicas: beyond, Prometheus reads Ray's own metrics ports.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from agents.engine import Card
from onebox.errors import OneboxError

FRESH_S: Final = 1.0
READ_TIMEOUT_S: Final = 2.0


class Client(Protocol):
    """What is asked of a model's fleet; `agents.engine.EngineClient` is one."""

    async def metrics(self, timeout_s: float) -> Mapping[str, str]:
        """The exposition of each replica that answers, by its door."""
        ...

    async def card(self) -> Card:
        """What the replicas serve."""
        ...


class EngineMetrics:
    """The page; read again when it is older than a second, so that many scrapes cost the fleet no more than one."""

    def __init__(self, clients: Iterable[Client]) -> None:
        self._clients = tuple(clients)
        self._page = b""
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def page(self) -> bytes:
        """All series; those of models that do not answer are missing."""
        async with self._reading:
            if time.monotonic() - self._read_at > FRESH_S:
                pages = [page for pages in await asyncio.gather(*map(_pages, self._clients)) for page in pages]
                self._page = await asyncio.to_thread(merge, pages)
                self._read_at = time.monotonic()
        return self._page


async def _pages(client: Client) -> list[tuple[Mapping[str, str], str]]:
    try:
        pages, card = await asyncio.gather(client.metrics(READ_TIMEOUT_S), client.card())
    except OneboxError:
        return []
    return [({"replica": door.partition("//")[2], "model": card.id}, page) for door, page in pages.items()]


def merge(pages: Iterable[tuple[Mapping[str, str], str]]) -> bytes:
    """Several expositions as one, the labels of each added to its series; a family's series stay together."""
    families: dict[str, list[str]] = {}
    for labels, page in pages:
        added = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
        family: list[str] = []
        known = False
        for line in page.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                known = name in families
                family = families.setdefault(name, [])
            if line.startswith("#"):
                if not known:
                    family.append(line)
            elif line:
                family.append(_labelled(line, added))
    return "".join(f"{line}\n" for family in families.values() for line in family).encode()


def _labelled(line: str, added: str) -> str:
    """A series with more labels."""
    name, brace, rest = line.partition("{")
    if brace and " " not in name:
        return f"{name}{{{added}{'' if rest.startswith('}') else ','}{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{added}}} {value}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
