"""What the page knows of learning: the choice of its key's tenant, and the replies whose correction was noted.

One for all sessions, as they have one key. What it looks like is `ui.decision`.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

from onebox.client import Client
from onebox.errors import NotFound, OneboxError
from onebox.labels import LabelScope, Learning

LABELS_SHOWN: Final = 50

logger = logging.getLogger(__name__)


class Learnt:
    """As of the last look; `learning` is None where it could not be read."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.learning: Learning | None = None
        self.labels: Mapping[str, str] = {}
        self._scope: LabelScope = "tenant"

    async def look(self) -> None:
        """Read it anew. Never raises: without it the page is whole but for this."""
        try:
            self.learning = await self._read()
            rows = (await self._client.labels.page(limit=LABELS_SHOWN)).data if self.learning != "off" else ()
        except OneboxError:
            logger.info("What is learned cannot be read", exc_info=True)
            self.learning, rows = None, ()
        self.labels = {row.label.run_id: row.label.id for row in rows if row.label.run_id is not None}

    async def choose(self, *, on: bool) -> None:
        """Learn nothing, or for whom it was when it was last on; this tenant alone where that is not known.

        Raises:
            OneboxError: the choice could not be kept.
        """
        await self._read()  # it may have been chosen elsewhere since the last look
        await self._client.labels.set_learning(self._scope if on else "off")
        await self.look()

    async def undo(self, label_id: str) -> None:
        """Undo a label; one that is gone already, undone in another tab or pushed out by newer ones, is no error.

        Raises:
            OneboxError: it could not be undone.
        """
        with suppress(NotFound):
            await self._client.labels.undo(label_id)
        await self.look()

    async def _read(self) -> Learning:
        """What is chosen; if it is on, for whom is kept."""
        learning = await self._client.labels.learning()
        if learning != "off":
            self._scope = learning
        return learning
