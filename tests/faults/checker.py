"""The judge: what users saw and what the store holds, held against the promises of durable runs.

I1 acknowledged is stored · I2 every run ends · I3 one run per key · I4 views are pieces of the log · I5 one terminal
event, last · I6 text as undisturbed · I7 no write after the end · I8 turns in order. It looks at records alone, so it
can be tried on hand-made ones; a checker that never was red proves nothing.
"""

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from onebox.events import Accepted, Completed, Event, Failed, Output, Stopped, TextDelta, is_terminal
from tests.faults.history import Attempt, ChatView, Snapshot, StoredRun, View

OUTPUT_TYPES: Final = {
    "item_added": "response.output_item.added",
    "part_added": "response.content_part.added",
    "text_done": "response.output_text.done",
    "part_done": "response.content_part.done",
    "item_done": "response.output_item.done",
}
STAGES: Final = tuple(OUTPUT_TYPES)
STATES: Final = {Completed: "completed", Failed: "failed", Stopped: "stopped"}
Expect = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule} {self.where}: {self.what}"


@dataclass
class Report:
    """What the checker found."""

    violations: list[Violation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, rule: str, where: str, what: str, count: str) -> None:
        """Note a violation under the figure it spoils."""
        self.violations.append(Violation(rule, where, what))
        self.counts[count] += 1


def text_of(log: Iterable[Event]) -> str:
    """The reply in a log."""
    return "".join(event.text for event in log if isinstance(event, TextDelta))


def wire_type(event: Event) -> str:
    """The type under which the Responses API sends the event."""
    if isinstance(event, Output):
        return OUTPUT_TYPES[event.stage]
    if isinstance(event, Completed):
        return "response.completed" if event.finish == "stop" else "response.incomplete"
    if isinstance(event, Accepted):
        return "response.created"
    if isinstance(event, TextDelta):
        return "response.output_text.delta"
    if isinstance(event, Failed):
        return "response.failed"
    return "response.incomplete" if isinstance(event, Stopped) else f"onebox.{event.kind}"


def check(attempts: Sequence[Attempt], snapshot: Snapshot, expected: Expect) -> Report:
    """Everything that is wrong. `expected` gives the undisturbed text of a run by its id, None where unknown."""
    report = Report()
    for run in snapshot.runs.values():
        _check_log(run, report)
        _check_text(run, expected(run.id), report)
    for attempt in attempts:
        _check_attempt(attempt, snapshot, report)
    _check_keys(attempts, snapshot, report)
    _check_conversations(attempts, snapshot, report)
    report.counts["runs"] = len(snapshot.runs)
    report.counts["messages sent"] = len(attempts)
    report.counts["acknowledged"] = sum(attempt.acknowledged for attempt in attempts)
    for run in snapshot.runs.values():
        report.counts[f"runs {run.state}"] += 1
    return report


def _check_log(run: StoredRun, report: Report) -> None:
    """I2, I5, I7 and the shape of the log."""
    ends = [index for index, event in enumerate(run.log) if is_terminal(event)]
    if run.state == "running" or not ends:
        report.add("I2", run.id, f"has no end: state {run.state!r}, {len(run.log)} events", "without a terminal event")
        return
    if ends != [len(run.log) - 1]:
        report.add("I5", run.id, f"terminal events at {ends} of {len(run.log)} events", "terminal events too many")
    if (state := STATES[type(run.log[ends[0]])]) != run.state:
        report.add("I5", run.id, f"is {run.state!r} and its log ends {state!r}", "states that differ")
    if run.late_log != run.log:
        report.add("I7", run.id, f"grew from {len(run.log)} to {len(run.late_log)} events after its end", "late writes")
    accepted = [index for index, event in enumerate(run.log) if isinstance(event, Accepted)]
    if accepted != [0]:
        report.add("I4", run.id, f"'accepted' at {accepted}, not at 0 alone", "broken logs")
    if run.epoch < 1:
        report.add("I7", run.id, f"epoch {run.epoch}", "broken logs")
    stages = [event.stage for event in run.log if isinstance(event, Output)]
    if stages != list(STAGES) and stages:
        report.add("I4", run.id, f"output boundaries {stages}", "broken logs")
    if text_of(run.log) and not stages:
        report.add("I4", run.id, "text without output boundaries", "broken logs")


def _check_text(run: StoredRun, expected: str | None, report: Report) -> None:
    """I6."""
    if expected is None:
        return
    text = text_of(run.log)
    whole = run.state == "completed"
    if text == expected if whole else expected.startswith(text):
        return
    report.add("I6", run.id, f"{run.state}, text differs {_difference(expected, text)}", "text differences")


def _check_attempt(attempt: Attempt, snapshot: Snapshot, report: Report) -> None:
    """I1, I4, I5 as one user saw them."""
    where = f"user {attempt.user} ({attempt.kind}) {sorted(attempt.run_ids)}"
    if attempt.key is not None and len(_kept(attempt.run_ids, snapshot)) > 1:
        report.add("I3", where, f"one key, {len(attempt.run_ids)} runs", "duplicates")
    if attempt.forgotten:
        report.add("I1", where, "the gateway no longer knows a run it acknowledged", "lost")
    if attempt.rejected is not None:
        report.add("I1", where, f"refused with {attempt.rejected!r}, as if the user were to blame", "wrong refusals")
    if attempt.acknowledged and not attempt.ended:
        report.add("I2", where, f"no end within its time; refusals {Counter(attempt.refusals)}", "hung")
    for chat in attempt.chats:
        if chat.error is not None and not chat.text:
            report.add("I5", where, f"a 200 with nothing but the error {chat.error!r}", "wrong refusals")
    for run_id in attempt.run_ids:
        run = snapshot.runs.get(run_id)
        if run is None:
            report.add("I1", where, f"{run_id} was acknowledged and is not stored", "lost")
            continue
        for view in attempt.views:
            for problem in view_problems(view, run):
                report.add("I4", where, problem, "views that differ from the log")
        for chat in attempt.chats:
            for problem in chat_problems(chat, run):
                report.add("I5" if "[DONE]" in problem else "I4", where, problem, "views that differ from the log")
    for problem in _differing_bytes(attempt.views):
        report.add("I4", where, problem, "views that differ from the log")


def view_problems(view: View, run: StoredRun) -> Iterator[str]:
    """Where a view is no piece of the log."""
    for place, seen in enumerate(view.seen):
        number = view.after + 1 + place
        if seen.number != number:
            yield f"event {seen.number} came where {number} was due"
            return
        if number >= len(run.log):
            yield f"event {number} ({seen.type}) was sent and is not stored"
            return
        event = run.log[number]
        if seen.type != wire_type(event):
            yield f"event {number} is {wire_type(event)!r} in the log and was sent as {seen.type!r}"
            return
        if isinstance(event, TextDelta) and seen.delta != event.text:
            yield f"event {number} is {event.text!r} in the log and was sent as {seen.delta!r}"
            return
    if view.ended == "terminal" and view.after + 1 + len(view.seen) != len(run.log):
        yield f"ended after {view.after + 1 + len(view.seen)} of {len(run.log)} events"


def chat_problems(chat: ChatView, run: StoredRun) -> Iterator[str]:
    """Where a chat stream is no piece of the log, or promises an end that was none."""
    text = text_of(run.log)
    if chat.done and (run.state != "completed" or chat.finish is None):
        yield f"[DONE] and the run is {run.state!r}, finish {chat.finish!r}"
    if not (chat.text == text if chat.done else text.startswith(chat.text)):
        yield f"chat text differs from the log {_difference(text, chat.text)}"


def _differing_bytes(views: Sequence[View]) -> Iterator[str]:
    known: dict[int, bytes] = {}
    for view in views:
        for seen in view.seen:
            if known.setdefault(seen.number, seen.raw) != seen.raw:
                yield f"event {seen.number} was sent in two ways: {known[seen.number]!r} and {seen.raw!r}"
                return


def _check_keys(attempts: Sequence[Attempt], snapshot: Snapshot, report: Report) -> None:
    """I3."""
    by_key: dict[str, set[str]] = defaultdict(set)
    for run in snapshot.runs.values():
        if run.key is not None:
            by_key[run.key].add(run.id)
    for key, runs in by_key.items():
        if len(kept := _kept(runs, snapshot)) > 1:
            report.add("I3", key, f"one key, {len(kept)} stored runs", "duplicates")
    for attempt in attempts:
        if attempt.key is None or not attempt.acknowledged:
            continue
        kept = snapshot.keys.get(attempt.key)
        if kept is None:
            report.add("I3", attempt.key, "the key of an acknowledged run is not kept", "lost")
        elif attempt.run_ids and kept not in attempt.run_ids:
            report.add("I3", attempt.key, f"leads to {kept}, users saw {sorted(attempt.run_ids)}", "duplicates")


def _kept(runs: Iterable[str], snapshot: Snapshot) -> set[str]:
    """The runs but for those that failed before they had any text: their key may be used again."""
    return {
        name for name in runs if (run := snapshot.runs.get(name)) is None or run.state != "failed" or text_of(run.log)
    }


def _check_conversations(attempts: Sequence[Attempt], snapshot: Snapshot, report: Report) -> None:
    """I1 and I8: each message once, in its user's order, with the reply its log has."""
    sent: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        if attempt.conversation is not None:
            sent[attempt.conversation].append(attempt)
    for identifier, messages in sent.items():
        turns = snapshot.conversations.get(identifier, ())
        stored = [turn.user for turn in turns]
        # Without a key, a message that was refused and sent again is another message.
        again = {attempt.prompt for attempt in messages if attempt.key is None and attempt.refusals}
        for prompt, times in Counter(stored).items():
            if times > 1 and prompt not in again:
                report.add("I3", identifier, f"{prompt[:60]!r} is there {times} times", "duplicates")
        for attempt in messages:
            if attempt.acknowledged and attempt.prompt not in stored:
                report.add("I1", identifier, f"{attempt.prompt[:60]!r} was acknowledged and is not there", "lost")
        order = [attempt.prompt for attempt in messages if attempt.prompt in stored]
        if order != [prompt for prompt in dict.fromkeys(stored) if prompt in order]:
            report.add("I8", identifier, "turns are not in the order they were sent", "turns interleaved")
        for turn in turns:
            for variant in turn.variants:
                run = snapshot.runs.get(variant.run_id)
                if run is None:
                    report.add("I1", identifier, f"its run {variant.run_id} is not stored", "lost")
                elif (variant.state, variant.text) != (run.state, text_of(run.log)):
                    report.add(
                        "I8",
                        f"{identifier} {run.id}",
                        f"shows {variant.state!r} {_difference(text_of(run.log), variant.text)}, log is {run.state!r}",
                        "conversations that differ from the log",
                    )
    for run_id in snapshot.leases & snapshot.runs.keys():
        report.add("I2", run_id, "is still leased when all is quiet", "leases left")


def _difference(expected: str, found: str) -> str:
    matcher = difflib.SequenceMatcher(None, expected, found, autojunk=False)
    for kind, from_a, to_a, from_b, to_b in matcher.get_opcodes():
        if kind != "equal":
            return f"at {from_a}: {kind} {expected[from_a:to_a][:60]!r} by {found[from_b:to_b][:60]!r}"
    return "nowhere"
