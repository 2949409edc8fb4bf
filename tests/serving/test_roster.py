"""What a replica knows of its fleet while Serve answers, does not answer, or no longer counts it in."""

import asyncio
from collections.abc import Sequence

from serving.roster import FRESH_PER_REPLICA_S, FRESH_S, Load, Roster

OWN, OTHER = (Load(f"http://127.0.0.1:{port}", 1, 0, 4, 0.5, 100, draining=False) for port in (1, 2))


class Serve:
    """The answers that a broadcast would have; counts how often it is asked."""

    def __init__(self, *answers: object) -> None:
        self.answers: Sequence[object] = answers
        self.asked = 0
        self.changes: list[bool] = []

    async def ask(self) -> Sequence[object]:
        self.asked += 1
        await asyncio.sleep(0)
        if isinstance(self.answers[0], BaseException):
            raise self.answers[0]
        return self.answers

    def roster(self) -> Roster:
        return Roster(lambda: OWN, self.ask, self.changes.append)


async def test_all_who_ask_at_once_cost_one_broadcast() -> None:
    serve = Serve(OWN.record(), OTHER.record())
    roster = serve.roster()
    answers = await asyncio.gather(*(roster.records() for _ in range(50)))
    assert serve.asked == 1
    assert all({record["door"] for record in records} == {OWN.door, OTHER.door} for records in answers)


async def test_replica_that_fails_to_answer_is_left_out() -> None:
    records = await Serve(OWN.record(), RuntimeError("died")).roster().records()
    assert [record["door"] for record in records] == [OWN.door]


async def test_fleet_that_cannot_be_asked_is_as_it_was() -> None:
    serve = Serve(OWN.record(), OTHER.record())
    roster = serve.roster()
    before = await roster.records()
    serve.answers = (TimeoutError(),)
    await _grow_stale()
    assert await roster.records() == before
    assert serve.asked == 2
    assert serve.changes == []


async def test_replica_that_is_not_counted_in_any_more_says_so_until_it_is_again() -> None:
    serve = Serve(OWN.record(), OTHER.record())
    roster = serve.roster()
    await roster.records()
    serve.answers = (OTHER.record(),)
    for _ in range(2):
        await _grow_stale()
        assert [record["door"] for record in await roster.records()] == [OTHER.door]
    assert serve.changes == [False]
    serve.answers = (OWN.record(), OTHER.record())
    await _grow_stale()
    assert len(await roster.records()) == 2
    assert serve.changes == [False, True]


async def test_replica_whose_own_answer_is_late_does_not_take_itself_for_gone() -> None:
    serve = Serve(OWN.record(), OTHER.record())
    roster = serve.roster()
    await roster.records()
    serve.answers = (RuntimeError("late"), OTHER.record())
    await _grow_stale()
    assert len(await roster.records()) == 2
    assert serve.changes == []


async def test_replica_that_is_not_counted_in_yet_lists_itself() -> None:
    serve = Serve(OTHER.record())
    assert [record["door"] for record in await serve.roster().records()] == [OWN.door, OTHER.door]
    assert serve.changes == []


async def _grow_stale() -> None:
    await asyncio.sleep(FRESH_S + 3 * FRESH_PER_REPLICA_S)
