"""The judge on histories made by hand: silent on a good one, and never on a bad one."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from onebox.events import Accepted, Completed, Event, Failed, Output, TextDelta, Usage
from tests.faults.checker import check, wire_type
from tests.faults.history import Attempt, ChatView, Seen, Snapshot, StoredRun, StoredTurn, StoredVariant, View

TEXT = "Rain on the roof"
LOG: tuple[Event, ...] = (
    Accepted("resp_1", "conv_1", "turn_1"),
    Output("item_added"),
    Output("part_added"),
    TextDelta("Rain on"),
    TextDelta(" the roof"),
    Output("text_done"),
    Output("part_done"),
    Output("item_done"),
    Usage(3, 4),
    Completed(),
)
LAST = len(LOG) - 1

History = tuple[list[Attempt], Snapshot]


def seen(number: int, event: Event) -> Seen:
    delta = event.text if isinstance(event, TextDelta) else ""
    return Seen(number, wire_type(event), delta, f"{number}".encode(), float(number))


def view(start: int, end: int) -> View:
    """A connection that saw the events from `start` up to `end`, and the end where that is the last."""
    events = [seen(number, LOG[number]) for number in range(start, end + 1)]
    return View(start - 1, events, "terminal" if end == LAST else "broken")


def good() -> History:
    run = StoredRun("resp_1", "completed", 2, "conv_1", "key", LOG, LOG)
    attempt = Attempt(0, "responses", "chat", "Rain?", 4, "key", "conv_1", {"resp_1"}, True, ended=True)
    attempt.views += [view(0, 3), view(4, LAST), view(2, LAST)]
    attempt.chats.append(ChatView(TEXT, True, "stop", True))
    attempt.chats.append(ChatView("Rain", True))
    turns = {"conv_1": (StoredTurn("Rain?", (StoredVariant("resp_1", "completed", TEXT),)),)}
    return [attempt], Snapshot({"resp_1": run}, turns, {"key": "resp_1"}, frozenset())


def rules(history: History, expected: str = TEXT) -> set[str]:
    return {violation.rule for violation in check(*history, lambda _: expected).violations}


def with_run(change: Callable[[StoredRun], StoredRun]) -> History:
    attempts, snapshot = good()
    return attempts, replace(snapshot, runs={"resp_1": change(snapshot.runs["resp_1"])})


def with_log(*log: Event, state: str = "completed") -> History:
    attempts, snapshot = with_run(lambda run: replace(run, log=log, late_log=log, state=state))
    attempts[0].views.clear()
    attempts[0].chats.clear()
    return attempts, snapshot


def test_a_good_history_has_no_violation() -> None:
    assert check(*good(), lambda _: TEXT).violations == []


def test_an_acknowledged_run_that_is_not_stored_is_lost() -> None:
    attempts, snapshot = good()
    assert rules((attempts, replace(snapshot, runs={}))) == {"I1"}


def test_an_acknowledged_message_that_is_not_in_its_conversation_is_lost() -> None:
    attempts, snapshot = good()
    assert rules((attempts, replace(snapshot, conversations={"conv_1": ()}))) == {"I1"}


def test_a_run_the_gateway_forgot_or_a_message_it_refused_is_lost() -> None:
    attempts, snapshot = good()
    attempts[0].forgotten = True
    assert rules((attempts, snapshot)) == {"I1"}
    attempts, snapshot = good()
    attempts[0].rejected = "404 response_not_found"
    assert rules((attempts, snapshot)) == {"I1"}


def test_a_key_that_is_not_kept_or_leads_elsewhere_breaks_i3() -> None:
    attempts, snapshot = good()
    assert rules((attempts, replace(snapshot, keys={}))) == {"I3"}
    assert rules((attempts, replace(snapshot, keys={"key": "resp_2"}))) == {"I3"}


def test_a_run_without_an_end_breaks_i2() -> None:
    assert "I2" in rules(with_log(*LOG[:-1], state="running"))
    assert "I2" in rules(with_log(*LOG[:-1]))


def test_a_stream_that_never_ended_breaks_i2() -> None:
    attempts, snapshot = good()
    attempts[0].ended = False
    assert rules((attempts, snapshot)) == {"I2"}


def test_a_lease_that_is_left_breaks_i2() -> None:
    attempts, snapshot = good()
    assert rules((attempts, replace(snapshot, leases=frozenset({"resp_1"})))) == {"I2"}


def test_two_runs_of_one_key_break_i3_unless_the_first_failed_with_nothing() -> None:
    attempts, snapshot = good()
    second = replace(snapshot.runs["resp_1"], id="resp_2")
    assert "I3" in rules((attempts, replace(snapshot, runs=snapshot.runs | {"resp_2": second})))
    attempts[0].run_ids.add("resp_2")
    assert "I3" in rules((attempts, replace(snapshot, runs=snapshot.runs | {"resp_2": second})))
    log = (Accepted("resp_2"), Usage(0, 0), Failed("unavailable", "", True))
    empty = StoredRun("resp_2", "failed", 1, None, "key", log, log)
    attempts, snapshot = good()
    assert rules((attempts, replace(snapshot, runs=snapshot.runs | {"resp_2": empty}))) == set()


def test_a_message_that_is_there_twice_breaks_i3() -> None:
    attempts, snapshot = good()
    turns = 2 * snapshot.conversations["conv_1"]
    assert rules((attempts, replace(snapshot, conversations={"conv_1": turns}))) == {"I3"}


@pytest.mark.parametrize(
    "wrong",
    [
        View(-1, [seen(0, LOG[0]), seen(2, LOG[2])]),
        View(0, [seen(0, LOG[0])]),
        View(2, [seen(3, TextDelta("Rain in"))]),
        View(2, [seen(3, LOG[2])]),
        View(LAST, [seen(LAST + 1, TextDelta("!"))]),
        View(-1, [seen(0, LOG[0])], "terminal"),
    ],
    ids=["gap", "repeated", "other text", "other type", "not stored", "ended early"],
)
def test_a_view_that_is_no_piece_of_the_log_breaks_i4(wrong: View) -> None:
    attempts, snapshot = good()
    attempts[0].views.append(wrong)
    assert rules((attempts, snapshot)) == {"I4"}


def test_an_event_that_is_sent_in_two_ways_breaks_i4() -> None:
    attempts, snapshot = good()
    event = seen(3, LOG[3])
    attempts[0].views.append(View(2, [replace(event, raw=b"other")]))
    assert rules((attempts, snapshot)) == {"I4"}


@pytest.mark.parametrize(
    "log",
    [
        (LOG[0], *LOG),
        (*LOG[:8], LOG[7], *LOG[8:]),
        (*LOG[:1], *LOG[3:]),
        (LOG[0], LOG[3], LOG[4], *LOG[8:]),
    ],
    ids=["accepted twice", "boundary twice", "boundary missing", "no boundaries"],
)
def test_a_log_of_the_wrong_shape_breaks_i4(log: tuple[Event, ...]) -> None:
    assert rules(with_log(*log)) == {"I4"}


def test_events_after_the_end_or_an_end_of_another_state_break_i5() -> None:
    assert "I5" in rules(with_log(*LOG, Completed()))
    assert "I5" in rules(with_log(*LOG, Usage(1, 1)))
    assert "I5" in rules(with_log(*LOG[:-1], Failed("engine_failed", "", True)))


def test_done_without_a_completed_run_breaks_i5() -> None:
    attempts, snapshot = with_run(
        lambda run: replace(run, log=(*LOG[:-1], Failed("engine_failed", "", True)), state="failed")
    )
    assert "I5" in rules((attempts, snapshot))


def test_a_chat_that_differs_from_the_log_breaks_i4() -> None:
    for chat in (ChatView("Rain in", True), ChatView("Rain on", True, "stop", True)):
        attempts, snapshot = good()
        attempts[0].chats.append(chat)
        assert rules((attempts, snapshot)) == {"I4"}


def test_a_200_with_nothing_but_an_error_breaks_i5() -> None:
    attempts, snapshot = good()
    attempts[0].chats.append(ChatView(error="overloaded"))
    assert rules((attempts, snapshot)) == {"I5"}


def test_a_text_that_is_not_the_undisturbed_one_breaks_i6() -> None:
    assert rules(good(), "Rain on the roofs") == {"I6"}
    failed = with_log(LOG[0], *LOG[1:4], *LOG[5:9], Failed("engine_failed", "", True), state="failed")
    failed[1].conversations["conv_1"] = (StoredTurn("Rain?", (StoredVariant("resp_1", "failed", "Rain on"),)),)
    assert rules(failed) == set()
    assert rules(failed, "Rain in") == {"I6"}


def test_a_log_that_grows_after_its_end_breaks_i7() -> None:
    assert rules(with_run(lambda run: replace(run, late_log=(*LOG, TextDelta("!"))))) == {"I7"}
    assert rules(with_run(lambda run: replace(run, epoch=0))) == {"I7"}


def test_a_conversation_that_differs_from_the_log_or_is_out_of_order_breaks_i8() -> None:
    attempts, snapshot = good()
    turns = (StoredTurn("Rain?", (StoredVariant("resp_1", "running", "Rain"),)),)
    assert rules((attempts, replace(snapshot, conversations={"conv_1": turns}))) == {"I8"}
    attempts, snapshot = good()
    later = replace(attempts[0], prompt="Sun?", run_ids=set(), views=[], chats=[], key=None)
    (turn,) = snapshot.conversations["conv_1"]
    turns = (StoredTurn("Sun?", ()), turn)
    assert rules(([*attempts, later], replace(snapshot, conversations={"conv_1": turns}))) == {"I8"}
