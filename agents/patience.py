"""Time limits on waits that come in great numbers, such as for each piece of a reply.

`asyncio.timeout` sets a timer for each wait and takes it away again, 6 µs of CPU; of many waits nearly all are short.
Here one timer is left to ring and only then looks whether the wait that goes on is over its limit: 1 µs.

A limit is of the time that the other side takes, not of the time for which this process did not look: where the event
loop was busy when a wait was due to end, what has come meanwhile is read first.
"""

import asyncio
import time
from collections.abc import Awaitable
from typing import Final, TypeVar

LATE_S: Final = 0.02

_Answer = TypeVar("_Answer")


class Patience:
    """The waits of one task at a time, one after the other."""

    __slots__ = ("_due", "_expired", "_extended", "_loop", "_rings_at", "_task", "_timer")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = float("inf")
        self._due = float("inf")
        self._task: asyncio.Task[object] | None = None  # what waits now
        self._expired = False
        self._extended = False

    async def wait(self, answer: Awaitable[_Answer], limit_s: float) -> _Answer:
        """The answer.

        Raises:
            TimeoutError: it took longer than `limit_s`, or `expire` was called.
        """
        # Not the loop's clock: uvloop's stands still while its callbacks run.
        self._due = time.monotonic() + limit_s
        if self._due < self._rings_at:
            self._ring_at(self._due)
        task = asyncio.current_task(self._loop)
        assert task is not None, "only a task can wait"
        before = task.cancelling()
        self._task, self._expired, self._extended = task, False, False
        try:
            return await answer
        except asyncio.CancelledError:
            if self._expired and task.uncancel() <= before:
                raise TimeoutError from None
            raise
        finally:
            self._task = None

    def expire(self) -> None:
        """End the wait that goes on, if there is one."""
        if self._task is not None and not self._expired:
            self._expired = True
            self._task.cancel()

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._rings_at = float("inf")

    def _ring_at(self, when: float) -> None:
        self.close()
        self._timer, self._rings_at = self._loop.call_later(when - time.monotonic(), self._ring), when

    def _ring(self) -> None:
        self._timer, self._rings_at = None, float("inf")
        if self._task is None:
            return  # the next wait sets the timer
        late_s = time.monotonic() - self._due
        if late_s > LATE_S and not self._extended:
            self._extended = True
            self._due += 2 * late_s
        if time.monotonic() >= self._due:
            self.expire()
        else:
            self._ring_at(self._due)
