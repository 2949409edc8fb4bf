"""The second run of a run's plugins: the journal answers in the old order, the log gets only what it lacks."""

import asyncio

import pytest

from agents.journal import Diverged, Entry, Journal, decode_entries, encode_entries
from agents.replay import Replay
from onebox.errors import BadRequest, Overloaded
from onebox.events import Event, Output, Progress, Queued, StepStarted, TextDelta, Token


def replayed(logged: list[Event], again: list[Event]) -> list[Event]:
    replay = Replay(logged)
    return [fresh for event in again if (fresh := replay.fresh(event)) is not None]


def test_events_of_the_log_are_not_sent_again() -> None:
    logged: list[Event] = [StepStarted(0, "chat"), Output("item_added"), TextDelta("Hello wor")]
    again: list[Event] = [
        StepStarted(0, "chat"),
        Output("item_added"),
        TextDelta("Hel"),
        TextDelta("lo world"),
        TextDelta("!"),
    ]
    assert replayed(logged, again) == [TextDelta("ld"), TextDelta("!")]


def test_text_is_compared_as_text_however_it_was_cut() -> None:
    logged: list[Event] = [TextDelta("ab"), TextDelta("cdef"), Progress(1, 2, "x"), TextDelta("gh")]
    again: list[Event] = [TextDelta("abc"), TextDelta("d"), TextDelta("ef"), Progress(1, 2, "x"), TextDelta("ghi")]
    assert replayed(logged, again) == [TextDelta("i")]


def test_waiting_in_a_queue_is_no_part_of_what_was_done() -> None:
    logged: list[Event] = [Queued(2, 1.0), StepStarted(0, "chat"), TextDelta("ab"), Queued(0, 0.0), TextDelta("cd")]
    assert replayed(logged, [StepStarted(0, "chat"), TextDelta("abcde")]) == [TextDelta("e")]
    replay = Replay([Queued(1), Queued(0)])
    assert replay.done


def test_tokens_stay_with_the_text_that_is_new() -> None:
    one, two = Token("ab", 1, -0.1), Token("cd", 2, -0.2)
    assert replayed([TextDelta("ab", (one,))], [TextDelta("abcd", (one, two))]) == [TextDelta("cd", (two,))]


@pytest.mark.parametrize(
    ("logged", "again"),
    [
        ([TextDelta("abc")], [TextDelta("abd")]),
        ([TextDelta("abc")], [Progress(1, 2, "x")]),
        ([Progress(1, 2, "x")], [Progress(1, 3, "x")]),
        ([Progress(1, 2, "x")], [TextDelta("a")]),
        ([TextDelta("ab"), Progress(1, 2, "x")], [TextDelta("abc")]),
    ],
)
def test_what_differs_from_the_log_is_told_and_not_sent(logged: list[Event], again: list[Event]) -> None:
    with pytest.raises(Diverged):
        replayed(logged, again)


def test_log_that_did_not_come_again_is_not_done() -> None:
    replay = Replay([TextDelta("abc")])
    assert replay.fresh(TextDelta("ab")) is None
    assert not replay.done
    assert replay.fresh(TextDelta("c")) is None
    assert replay.done


async def test_answers_come_in_the_order_of_the_first_time() -> None:
    first: list[Entry] = []
    journal = Journal(first.append)
    one, two = journal.open("complete", "a"), journal.open("complete", "b")
    for key, value in ((two, 1), (one, 2), (two, 3), (one, 4)):
        journal.note(key, "value", value)
    again = Journal(first.append, decode_entries([encode_entries(first)]))
    order: list[int] = []

    async def ask(key: str) -> None:
        while (entry := await again.answer(key)) is not None:
            order.append(entry.value)
            await asyncio.sleep(0)

    assert [again.open("complete", "a"), again.open("complete", "b")] == [one, two]
    await asyncio.gather(ask(one), ask(two))
    assert order == [1, 2, 3, 4]
    assert again.used_up


async def test_call_that_nobody_repeats_is_a_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.journal.STUCK_S", 0.05)
    entries: list[Entry] = []
    journal = Journal(entries.append)
    journal.note(journal.open("complete", "a"), "value", 1)
    again = Journal(entries.append, entries)
    with pytest.raises(Diverged):
        await again.answer(again.open("complete", "other"))


def test_time_is_that_of_the_first_run() -> None:
    entries: list[Entry] = []
    assert Journal(entries.append).quick("now", lambda: 5.0) == 5.0
    again = Journal(entries.append, list(entries))
    assert again.quick("now", lambda: 6.0) == 5.0
    assert again.quick("now", lambda: 6.0) == 6.0


def test_only_errors_that_would_come_again_are_kept() -> None:
    entries: list[Entry] = []
    journal = Journal(entries.append)
    journal.note_error("k", Overloaded("full"))
    journal.note_error("k", BadRequest("bad"))
    assert entries == [Entry("k", "error", ["invalid_request", "bad"])]


def test_equal_calls_are_told_apart_by_their_count() -> None:
    journal = Journal(lambda entry: None)
    keys = [journal.open("complete", "a"), journal.open("complete", "a"), journal.open("complete", "b")]
    assert len(set(keys)) == 3
