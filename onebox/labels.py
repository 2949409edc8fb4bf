"""Labels: what users' corrections say about the router's decisions.

Pure values, and what the API writes of them. What becomes of a label is the router's business; where labels arise and
are kept is `agents.corrections` and `agents.labels`.
"""

from dataclasses import dataclass
from typing import Final, Literal, Self

from pydantic import JsonValue, TypeAdapter

from onebox.messages import Message, Role

Learning = Literal["off", "tenant", "global"]
LabelSource = Literal["reroute", "plan", "variant", "api"]
LabelScope = Literal["tenant", "global"]


@dataclass(frozen=True, slots=True)
class Label:
    """What was right for a message. `created` is in seconds since 1970.

    `messages` are what the router saw, the last one the user's; of long ones the beginning and the end. `plan` has the
    right tasks in order, `was` what had been decided; `run_id` is the run that the correction was made at.
    """

    id: str
    created: float
    source: LabelSource
    messages: tuple[Message, ...]
    plan: tuple[str, ...]
    was: tuple[str, ...] = ()
    scope: LabelScope = "tenant"
    run_id: str | None = None


@dataclass(frozen=True, slots=True)
class LabelState:
    """A label, and why the router does not use it; `reason` is None where it does."""

    label: Label
    reason: str | None = None

    @property
    def used(self) -> bool:
        """Whether the router decides by it."""
        return self.reason is None

    def to_json(self) -> dict[str, JsonValue]:
        """As the API writes it."""
        label = self.label
        return {
            "id": label.id,
            "created": label.created,
            "source": label.source,
            "messages": [{"role": message.role, "content": message.text} for message in label.messages],
            "plan": list(label.plan),
            "was": list(label.was),
            "scope": label.scope,
            "run_id": label.run_id,
            "used": self.used,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, value: JsonValue) -> Self:
        """Raises `pydantic.ValidationError`."""
        wire = _WIRE.validate_python(value)
        messages = tuple(Message(said.role, said.content) for said in wire.messages)
        label = Label(
            wire.id, wire.created, wire.source, messages, wire.plan, wire.was, wire.scope, wire.run_id
        )  # fmt: skip
        return cls(label, wire.reason)


@dataclass(frozen=True, slots=True)
class LabelPage:
    """Labels, newest first; `next` is the cursor of the following page."""

    data: tuple[LabelState, ...] = ()
    next: str | None = None


@dataclass(frozen=True, slots=True)
class _Said:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class _Wire:
    id: str
    created: float
    source: LabelSource
    messages: tuple[_Said, ...]
    plan: tuple[str, ...]
    was: tuple[str, ...]
    scope: LabelScope
    run_id: str | None
    reason: str | None


_WIRE: Final = TypeAdapter(_Wire)
