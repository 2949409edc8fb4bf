"""What of a run's events is new when another worker runs its plugins again.

The log has a beginning of the same events. What it has is not sent twice; what differs from it must not be sent at
all. Pieces of text may be cut otherwise the second time: they are compared as text. Having waited in a queue is no
part of what was done.
"""

from collections import deque
from collections.abc import Iterable

from agents.journal import Diverged
from onebox.events import Event, Queued, TextDelta, Token


class Replay:
    """Compares the events of a second run with `logged`, those of the first."""

    def __init__(self, logged: Iterable[Event]) -> None:
        self._logged = deque(event for event in logged if _was_done(event))
        self._offset = 0

    @property
    def done(self) -> bool:
        """Whether all that the log has came again."""
        return not self._logged

    def fresh(self, event: Event) -> Event | None:
        """What of `event` the log does not have; None where it has all of it.

        Raises:
            Diverged: the log has something else in its place.
        """
        if not self._logged:
            return event
        if isinstance(event, TextDelta):
            return self._fresh_text(event)
        if event != self._logged[0]:
            raise Diverged(f"{event.kind} came where the log has {self._logged[0].kind}")
        self._logged.popleft()
        return None

    def _fresh_text(self, delta: TextDelta) -> TextDelta | None:
        text = delta.text
        while text and self._logged:
            head = self._logged[0]
            if not isinstance(head, TextDelta):
                raise Diverged(f"text came where the log has {head.kind}")
            rest = head.text[self._offset :]
            if not (text.startswith(rest) or rest.startswith(text)):
                raise Diverged("other text came than the log has")
            if len(text) < len(rest):
                self._offset += len(text)
                return None
            self._logged.popleft()
            self._offset = 0
            text = text[len(rest) :]
        if not text:
            return None
        return TextDelta(text, _tokens_of(delta, text))


def _was_done(event: Event) -> bool:
    return bool(event.text) if isinstance(event, TextDelta) else not isinstance(event, Queued)


def _tokens_of(delta: TextDelta, rest: str) -> tuple[Token, ...]:
    """The last tokens of a delta, those that make up `rest`."""
    kept: list[Token] = []
    length = 0
    for token in reversed(delta.tokens):
        if length >= len(rest):
            break
        kept.append(token)
        length += len(token.text)
    return tuple(reversed(kept))
