"""How labels reach this worker's router: loaded at the start, whenever one changes anywhere, and after a lost message.

One task per worker. What has changed is asked of the store by version, so a label is read once, and a burst of changes
is one lesson. Where nobody has a label there is nothing to load and the router is left alone.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Final, Protocol, Self

from agents.labels import CHANNEL, Labels, TenantLabels
from agents.store import Store
from onebox.errors import StoreUnavailable
from onebox.labels import Label

CHECK_S: Final = 3.0  # a message published while the store is away is lost
GATHER_S: Final = 0.1
LISTEN_AGAIN_S: Final = 0.2
NOT_YET: Final = "It has not reached the router yet; that takes up to a second."
SWITCHED_OFF: Final = "Learning is off for this tenant. PUT /v1/labels/learning turns it on."
FAILED: Final = "The router could not learn from it; the server's log has the cause."

logger = logging.getLogger(__name__)


class Learner(Protocol):
    """Who learns from labels: `agents.router.Router`."""

    async def learn(self, shared: Sequence[Label], own: Mapping[str, Sequence[Label]]) -> Mapping[str, str]:
        """Use these labels from now on, and no others; `own` has each tenant's.

        Answers for each label that is not used, by its id, why.
        """
        ...


class LabelFeed:
    """The labels that this worker's router has. Use as an async context manager."""

    def __init__(self, store: Store, labels: Labels, learner: Learner) -> None:
        self._store = store
        self._labels = labels
        self._learner = learner
        self._changed = asyncio.Event()
        self._version = 0
        self._behind = False  # what is loaded has not been learned
        self._tenants: dict[str, TenantLabels] = {}
        self._taught: dict[str, float] = {}
        self._reasons: Mapping[str, str] = {}
        self._work: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._work = [asyncio.create_task(work(), name=work.__qualname__) for work in (self._listen, self._follow)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    def reason(self, label: Label) -> str | None:
        """Why the router of this worker does not use the label; None where it does."""
        if self._taught.get(label.id) != label.created:
            return NOT_YET
        return self._reasons.get(label.id)

    async def _listen(self) -> None:
        while True:
            try:
                async with aclosing(self._store.listen(CHANNEL)) as messages:
                    async for _ in messages:
                        self._changed.set()
            except StoreUnavailable:
                pass
            except Exception:
                logger.exception("Changes of labels cannot be listened for; they are looked for instead")
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def _follow(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self._labels.announce()
                await self._look()
            except StoreUnavailable:
                logger.debug("The store is away; the router keeps the labels that it has")
            except Exception:
                logger.exception("Labels could not be loaded")
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await self._changed.wait()
            await asyncio.sleep(GATHER_S)

    async def _look(self) -> None:
        """Load what has changed, and teach it; a lesson that failed is given again."""
        changes = await self._labels.changes(self._version)
        if changes.anew:
            self._tenants.clear()
            self._version, self._behind = 0, True
        for tenant in changes.tenants:
            known = self._tenants.get(tenant)
            self._tenants[tenant] = await self._labels.load(tenant, known.labels if known else {})
        self._behind = self._behind or bool(changes.tenants)
        self._version = changes.version
        if self._behind:
            self._behind = not await self._teach()

    async def _teach(self) -> bool:
        """Whether the router has learned what is loaded."""
        shared: list[Label] = []
        own: dict[str, Sequence[Label]] = {}
        unused: dict[str, str] = {}
        for tenant, has in self._tenants.items():
            labels = sorted(has.labels.values(), key=_age)
            if has.learning == "off":
                unused |= {label.id: SWITCHED_OFF for label in labels}
                continue
            # A tenant that shares no more keeps for itself what it has shared.
            sharing = has.learning == "global"
            shared += (label for label in labels if sharing and label.scope == "global")
            if mine := [label for label in labels if not (sharing and label.scope == "global")]:
                own[tenant] = mine
        shared.sort(key=_age)
        taught = [*shared, *(label for labels in own.values() for label in labels)]
        learned = True
        if taught or self._taught:
            try:
                unused |= await self._learner.learn(shared, own)
            except Exception:
                logger.exception("The router could not learn from %d labels", len(taught))
                unused |= dict.fromkeys((label.id for label in taught), FAILED)
                learned = False
        self._reasons = unused
        self._taught = {label.id: label.created for has in self._tenants.values() for label in has.labels.values()}
        return learned


def _age(label: Label) -> tuple[float, str]:
    return label.created, label.id
