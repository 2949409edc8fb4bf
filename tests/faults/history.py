"""What users did and saw in a storm, and what the store holds after it: plain records for the checker."""

from dataclasses import dataclass, field
from typing import Literal

from onebox.events import Event

Kind = Literal["responses", "leaver", "resender", "canceller", "task", "chat", "chat_keyed", "chat_leaver"]
Ended = Literal["terminal", "left", "broken"]


@dataclass(frozen=True, slots=True)
class Seen:
    """One event as it arrived. `delta` is its piece of the reply, '' for events without one; `at` is monotonic."""

    number: int
    type: str
    delta: str
    raw: bytes
    at: float


@dataclass(slots=True)
class View:
    """One connection's stream of a run, which was to begin after event `after`."""

    after: int
    seen: list[Seen] = field(default_factory=list)
    ended: Ended = "broken"


@dataclass(slots=True)
class ChatView:
    """One chat stream: its text, and how it ended. `error` is the code of the error it was told."""

    text: str = ""
    opened: bool = False
    finish: str | None = None
    done: bool = False
    error: str | None = None
    pieces_at: list[float] = field(default_factory=list)
    left: bool = False


@dataclass(slots=True)
class Attempt:
    """A message a user sent. `run_ids` are all the runs that answered to its one idempotency key.

    `forgotten`: the gateway told 404 for a run it had acknowledged. `rejected`: the refusal that ended it, which no
    well-formed message should get.
    """

    user: int
    kind: Kind
    model: str
    prompt: str
    max_tokens: int
    key: str | None
    conversation: str | None
    run_ids: set[str] = field(default_factory=set)
    acknowledged: bool = False
    views: list[View] = field(default_factory=list)
    chats: list[ChatView] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    cancelled: bool = False
    ended: bool = False
    forgotten: bool = False
    rejected: str | None = None
    began_at: float = 0.0
    acknowledged_at: float | None = None

    def acknowledge(self, at: float) -> None:
        """The user was told, the first time at `at`, that the message is accepted."""
        if not self.acknowledged:
            self.acknowledged, self.acknowledged_at = True, at


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run as the store has it. `log` is read once more later; `late_log` is that second reading."""

    id: str
    state: str
    epoch: int
    conversation: str | None
    key: str | None
    log: tuple[Event, ...]
    late_log: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class StoredVariant:
    """One reply in a conversation."""

    run_id: str
    state: str
    text: str


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """One question in a conversation, with its replies."""

    user: str
    variants: tuple[StoredVariant, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The store when all is quiet. `keys` maps idempotency keys to run ids; `leases` are runs still owned."""

    runs: dict[str, StoredRun]
    conversations: dict[str, tuple[StoredTurn, ...]]
    keys: dict[str, str]
    leases: frozenset[str]
