"""Telling a slow replica from a dead one while a reply waits for it, and finding another.

The replies are `agents.engine`'s, the replicas' doors `agents.fleet`'s.
"""

import asyncio
from collections.abc import Awaitable

from agents.course import Course, Lost
from agents.fleet import Fleet
from onebox.errors import EngineFailed


class Watch:
    """Looks after replicas that are silent, each `every_s`."""

    def __init__(self, fleet: Fleet, every_s: float) -> None:
        self._fleet = fleet
        self._every_s = every_s

    async def read(self, course: Course, read: Awaitable[bytes]) -> bytes:
        """The next bytes of a reply.

        Raises:
            Lost: its replica turns out dead before they come, and there is another one.
        """
        reading = asyncio.ensure_future(read)
        watching = asyncio.create_task(self._until_dead(course.door))
        try:
            await asyncio.wait((reading, watching), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            raise Lost("silent", EngineFailed("The engine's process fell silent in mid-reply. Try again."))
        finally:
            reading.cancel()
            watching.cancel()
            await asyncio.gather(reading, watching, return_exceptions=True)

    async def another(self, course: Course) -> str:
        """The door of a replica that lives, once the one that is asked, or may be, is found not to."""
        while True:
            for door in (course.heading,) if course.heading is not None else self._fleet.doors():
                if not await self._fleet.lives(door) and (other := await self._fleet.another(door)) is not None:
                    self._fleet.forget(door)
                    return other
            await asyncio.sleep(self._every_s)

    async def _until_dead(self, door: str | None) -> None:
        """Returns once the replica at `door` does not answer and another one does."""
        while True:
            if door is not None and not await self._fleet.lives(door) and await self._fleet.another(door) is not None:
                self._fleet.forget(door)
                return
            await asyncio.sleep(self._every_s)
