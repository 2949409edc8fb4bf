"""Limits on waits: what is over them, what is not, and whose time counts."""

import asyncio
import socket
import time

import pytest

from agents.patience import Patience


async def late(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "answer"


async def test_answer_within_the_limit_is_given_and_one_beyond_is_not() -> None:
    patience = Patience()
    assert await patience.wait(late(0.01), 0.5) == "answer"
    with pytest.raises(TimeoutError):
        await patience.wait(late(5), 0.05)
    assert await patience.wait(late(0), 0.5) == "answer"


async def test_many_waits_may_take_longer_together_than_one_may() -> None:
    patience = Patience()
    for _ in range(10):
        assert await patience.wait(late(0.02), 0.1) == "answer"


async def test_shorter_limit_after_a_longer_one_is_kept() -> None:
    patience = Patience()
    await patience.wait(late(0), 60)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await patience.wait(late(5), 0.05)
    assert time.monotonic() - began < 2


async def test_wait_without_end_can_be_ended() -> None:
    patience = Patience()
    asyncio.get_running_loop().call_later(0.02, patience.expire)
    with pytest.raises(TimeoutError):
        await patience.wait(late(5), float("inf"))
    patience.expire()  # nobody waits: nothing to end
    assert await patience.wait(late(0), 1) == "answer"


async def test_cancelled_waiter_is_cancelled_and_not_out_of_time() -> None:
    patience = Patience()
    waiter = asyncio.create_task(patience.wait(late(5), 5))
    await asyncio.sleep(0.01)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_answer_that_came_while_the_loop_was_busy_counts() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        answer = asyncio.get_running_loop().sock_recv(ours, 16)
        waiter = asyncio.create_task(Patience().wait(answer, 0.1))
        await asyncio.sleep(0.01)
        theirs.send(b"answer")
        time.sleep(0.3)  # the worker is busy beyond the limit
        assert await waiter == b"answer"
