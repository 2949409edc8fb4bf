"""What a plugin is given: `RunContext`, with the engine as `agents.llm` has it.

It belongs to one run, and whatever it answers that is not a pure function of the run is in its `agents.journal`. The
contract is `onebox.plugin`; a scripted twin for tests is in `onebox.testing`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from agents.encoder import Encoder
from agents.journal import Journal
from agents.llm import EngineLLM
from agents.store import Store
from onebox.capabilities import Capabilities


class RunContext:
    """Everything a plugin may touch in one run; implements `onebox.plugin.Context`."""

    def __init__(
        self,
        llm: EngineLLM,
        journal: Journal,
        encoder: Encoder,
        store: Store,
        capabilities: Callable[[], Awaitable[Capabilities]],
        run_id: str,
        tenant: str,
        plugin: str,
        deadline: float,
        logger: logging.Logger,
    ) -> None:
        self._llm = llm
        self._journal = journal
        self._encoder = encoder
        self._store = store
        self._capabilities = capabilities
        self._deadline = deadline
        self._values = f"onebox:{{{tenant}}}:plugin:{plugin}"
        self._random = Random(run_id)
        self._log = _tagged(logger, plugin, run_id)

    @property
    def llm(self) -> EngineLLM:
        """The engine."""
        return self._llm

    @property
    def random(self) -> Random:
        """Seeded per run."""
        return self._random

    @property
    def deadline_s(self) -> float:
        """Seconds left for the run."""
        left_s: float = self._journal.quick("deadline", lambda: max(0.0, self._deadline - time.time()))
        return left_s

    @property
    def log(self) -> logging.Logger:
        """Tagged with run and plugin."""
        return self._log

    def now(self) -> float:
        """Seconds since 1970, the same in a replay."""
        now_s: float = self._journal.quick("now", time.time)
        return now_s

    async def capabilities(self) -> Capabilities:
        """What the box can do now."""
        call = self._journal.open("capabilities")
        if (entry := await self._journal.answer(call)) is not None:
            return Capabilities.from_json(entry.value)
        found = await self._capabilities()
        self._journal.note(call, "value", found.to_json())
        return found

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One 512-dimensional unit vector per text."""
        if not texts:
            return []
        vectors: list[list[float]] = (await asyncio.to_thread(self._encoder.embed, texts)).tolist()
        return vectors

    async def retrieve(self, query: str, passages: Sequence[str], limit: int) -> list[int]:
        """Indices of the `limit` passages nearest to `query` by cosine, best first."""
        if not passages or limit < 1:
            return []
        vectors = await asyncio.to_thread(self._encoder.embed, [query, *passages])
        nearness = vectors[1:] @ vectors[0]
        order: list[int] = (-nearness).argsort(kind="stable")[:limit].tolist()
        return order

    async def get(self, key: str) -> str | None:
        """A value this plugin has put for this tenant."""
        call = self._journal.open("get", self._values, key)
        if (entry := await self._journal.answer(call)) is not None:
            return None if entry.value is None else str(entry.value)
        raw = await self._store.hash_get(self._values, key)
        value = raw.decode() if raw is not None else None
        self._journal.note(call, "value", value)
        return value

    async def put(self, key: str, value: str) -> None:
        """Keep a value for this plugin and tenant."""
        await self._store.hash_set(self._values, key, value)


def _tagged(base: logging.Logger, plugin: str, run_id: str) -> logging.Logger:
    """A logger of its own for one run: logging's registry would keep every run's name for ever."""
    logger = logging.Logger(f"{base.name}.{plugin}.{run_id}")
    logger.parent = base
    return logger
