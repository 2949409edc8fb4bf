"""What the API answers with, as values: conversations, tasks, readiness, whole replies.

Validated from JSON by `onebox.client`; the gateway writes the same shapes in `agents.api`.
"""

from dataclasses import dataclass, field
from typing import Literal, Self

from pydantic import JsonValue, TypeAdapter

from onebox.events import Routed, Stopped, Usage
from onebox.plugin import Example

VariantState = Literal["running", "completed", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a run failed."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Variant:
    """One answer to a turn; `receipt` is there where somebody stopped it."""

    run_id: str
    text: str
    task: str | None = None
    route: Routed | None = None
    state: VariantState = "completed"
    error: Problem | None = None
    usage: Usage | None = None
    feedback: Literal["like", "dislike"] | None = None
    receipt: Stopped | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A user message and its answers; `chosen` is the index of the one that counts."""

    id: str
    user: str
    created: float | str = 0.0
    variants: tuple[Variant, ...] = ()
    chosen: int = 0


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, oldest first."""

    id: str
    title: str | None = None
    created: float | str = 0.0
    updated: float | str = 0.0
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class ConversationSummary:
    """A line of the list; `turns` counts."""

    id: str
    title: str | None = None
    created: float | str = 0.0
    updated: float | str = 0.0
    turns: int = 0


@dataclass(frozen=True, slots=True)
class ConversationPage:
    """`next` is the cursor of the following page."""

    data: tuple[ConversationSummary, ...] = ()
    next: str | None = None


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task as the box offers it. `title` and `summary` map a language to a text."""

    name: str
    title: dict[str, str]
    summary: dict[str, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    params_schema: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What `POST /v1/tasks/{name}` answers."""

    run_id: str
    task: str
    text: str
    finish: str = "stop"
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """`engine` is ready, loading or down; `store` ok or down; "unknown" where nobody answers."""

    ready: bool
    store: str
    engine: str
    model: str | None = None
    detail: str | None = None


_ROUTE: TypeAdapter[Routed | None] = TypeAdapter(Routed | None)
_USAGE: TypeAdapter[Usage | None] = TypeAdapter(Usage | None)


@dataclass(frozen=True, slots=True)
class StartedRun:
    """A run that works on its own; `turn` is its turn where it has a conversation. `status` is OpenAI's word."""

    run_id: str
    status: str
    conversation: str | None = None
    turn: str | None = None

    @classmethod
    def from_wire(cls, data: dict[str, JsonValue]) -> Self:
        """The run in a `response` object."""
        conversation, extra = data.get("conversation"), data.get("onebox")
        named = conversation.get("id") if isinstance(conversation, dict) else None
        turn = extra.get("turn") if isinstance(extra, dict) else None
        return cls(
            run_id=str(data.get("id")),
            status=str(data.get("status")),
            conversation=named if isinstance(named, str) else None,
            turn=turn if isinstance(turn, str) else None,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    text: str
    finish: str
    run_id: str | None = None
    conversation: str | None = None
    route: Routed | None = None
    usage: Usage | None = None

    @classmethod
    def from_wire(cls, data: dict[str, JsonValue]) -> Self:
        """The reply in a `chat.completion` object."""
        choices = data.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else {}
        choice = first if isinstance(first, dict) else {}
        message = choice.get("message")
        extra = data.get("onebox")
        extra = extra if isinstance(extra, dict) else {}
        run_id, conversation = extra.get("run_id"), extra.get("conversation")
        return cls(
            text=str((message.get("content") if isinstance(message, dict) else "") or ""),
            finish=str(choice.get("finish_reason") or "stop"),
            run_id=run_id if isinstance(run_id, str) else None,
            conversation=conversation if isinstance(conversation, str) else None,
            route=_ROUTE.validate_python(extra.get("route")),
            usage=_USAGE.validate_python(data.get("usage")),
        )
