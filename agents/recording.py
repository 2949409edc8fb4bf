"""Keeps a running turn in the store: its text each half second, its lease, and its end, whatever the end is.

It decides nothing about the run; that is `agents.runs`.
"""

import asyncio
import logging
from dataclasses import replace
from typing import Final

from agents.conversations import BegunTurn, Conversations, Fault, State, Variant
from onebox.errors import StoreUnavailable
from onebox.events import Routed, Usage

FLUSH_S: Final = 0.5
RENEW_EVERY: Final = 6
END_RETRY_PAUSES_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)

logger = logging.getLogger(__name__)


class Recording:
    """One run's record. `start` it in a running loop; `end` it exactly once."""

    def __init__(self, conversations: Conversations, begun: BegunTurn, tasks: set[asyncio.Task[None]]) -> None:
        self._conversations = conversations
        self._begun = begun
        self._tasks = tasks
        self._pieces: list[str] = []
        self._variant = Variant(begun.run_id)
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to keep the turn."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self._begun.run_id}")

    def route(self, routed: Routed) -> None:
        """Note the decision."""
        self._variant = replace(self._variant, task=routed.task, route=routed)

    def append(self, text: str) -> None:
        """Note the next piece of the reply."""
        self._pieces.append(text)

    async def end(self, state: State, error: Fault | None, usage: Usage) -> None:
        """Store the whole reply and free the conversation, also while the caller is being cancelled.

        Raises:
            StoreUnavailable: not stored yet; it is tried again in the background for a quarter of a minute.
        """
        if self._keeper is not None:
            self._keeper.cancel()
        variant = replace(self._variant, text="".join(self._pieces), state=state, error=error, usage=usage)
        write = asyncio.create_task(self._conversations.end_turn(self._begun, variant))
        try:
            await asyncio.shield(write)
        except StoreUnavailable:
            self._own(asyncio.create_task(self._end_later(variant)))
            raise
        except asyncio.CancelledError:
            self._own(write)
            raise

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self) -> None:
        written = beat = 0
        while True:
            await asyncio.sleep(FLUSH_S)
            beat += 1
            count = len(self._pieces)
            if count == written and beat % RENEW_EVERY:
                continue
            variant = replace(self._variant, text="".join(self._pieces)) if count != written else None
            try:
                if not await self._conversations.keep_turn(self._begun, variant):
                    return
                written = count
            except StoreUnavailable:
                logger.warning("Run %s could not be kept in the store for now", self._begun.run_id)

    async def _end_later(self, variant: Variant) -> None:
        for pause_s in END_RETRY_PAUSES_S:
            await asyncio.sleep(pause_s)
            try:
                await self._conversations.end_turn(self._begun, variant)
            except StoreUnavailable:
                continue
            return
        logger.error("The end of run %s could not be stored; its text up to the last flush is", self._begun.run_id)
