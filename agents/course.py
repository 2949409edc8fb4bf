"""The course of one engine call: how far it has got, where it is, and how it may leave its replica.

It is what an abort from another task needs to know; the calls themselves are made by `agents.engine`.
"""

from typing import Literal

import aiohttp

from agents.generation import Generation, encode
from agents.patience import Patience
from onebox.errors import OneboxError

LossReason = Literal["cut", "stalled", "silent", "refused"]


class Lost(Exception):
    """The replica of a reply is lost to it; another one may go on."""

    def __init__(self, reason: LossReason, error: OneboxError) -> None:
        super().__init__(reason)
        self.reason: LossReason = reason
        self.error = error


class Stopped(Exception):
    """Somebody aborted the call."""


class Course:
    """How far one call has got and where it is: what an abort from another task needs to know."""

    __slots__ = ("attempts", "call", "door", "heading", "ids", "patience", "response", "resumed", "stopped")

    def __init__(self, call: Generation) -> None:
        self.call = call
        self.ids = list(call.resume)
        self.resumed = len(self.ids)  # of these, by the attempt at work
        self.attempts = 0
        self.door: str | None = None
        self.heading: str | None = None  # the door that is being asked; None: the ingress, or none
        self.response: aiohttp.ClientResponse | None = None
        self.patience = Patience()  # with whatever the call waits for
        self.stopped = False

    @property
    def wire_id(self) -> str:
        """Each attempt has an id of its own, for the one before may still be ending."""
        return f"{self.call.request_id}.{self.attempts}" if self.attempts > 1 else self.call.request_id

    def head_for(self, door: str | None) -> None:
        """Its replica is asked now; None: whichever the ingress chooses."""
        self.heading = door

    def next_body(self) -> bytes:
        """The request for what follows."""
        self.attempts += 1
        self.resumed = len(self.ids)
        return encode(self.call, self.ids, self.wire_id)

    def heed(self) -> None:
        """Raises `Stopped` once the call is aborted."""
        if self.stopped:
            raise Stopped

    def stop(self) -> None:
        """End the call, whatever it waits for."""
        self.stopped = True
        if self.response is not None:
            self.response.close()
        self.patience.expire()
