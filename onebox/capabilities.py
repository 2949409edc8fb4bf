"""What the box can do, how well, how fast now, and what it cannot: one object for the API, the page and the chat.

Made by `agents.capabilities`; every number in it is measured or a setting, never a promise.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

from pydantic import JsonValue, TypeAdapter

from onebox.plugin import Example, Lang

Health = Literal["ready", "loading", "down"]


@dataclass(frozen=True, slots=True)
class TaskAbility:
    """A task, three examples in each language; `routed_right` is the share of test messages for it that reach it.

    `not_routed` says why the router never picks it by itself, of a plugin whose examples would harm the other tasks.
    """

    name: str
    title: Mapping[Lang, str]
    summary: Mapping[Lang, str]
    examples: tuple[Example, ...]
    models: tuple[str, ...] = ()
    routed_right: float | None = None
    not_routed: str | None = None


@dataclass(frozen=True, slots=True)
class LanguageAbility:
    """A language of requests, by its ISO 639-1 code; `routed_right` is the share of test messages in it."""

    code: str
    routed_right: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest and most of everything. None where the engine has not said it yet."""

    context_tokens: int | None
    reply_tokens: int
    request_bytes: int
    messages: int
    plan_steps: int
    run_s: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians of this worker's latest replies: seconds to the first word, tokens a second. None before the first."""

    replies: int = 0
    first_text_s: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """How the router did on messages it was not trained on: shares right of all, and of its surest four fifths."""

    messages: int
    routed_right: float
    surest_right: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The whole. `cannot` says in each language what is declined, and what is possible instead."""

    health: Health
    models: tuple[str, ...]
    tasks: tuple[TaskAbility, ...]
    languages: tuple[LanguageAbility, ...]
    limits: Limits
    speed: Speed
    cannot: Mapping[Lang, tuple[str, ...]]
    quality: Quality | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: JsonValue) -> "Capabilities":
        """Raises `pydantic.ValidationError`."""
        return _ADAPTER.validate_python(value)


_ADAPTER: Final = TypeAdapter(Capabilities)
