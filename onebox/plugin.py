"""The plugin contract, whole. The built-in tasks come through the same door as anybody's.

A plugin is a class with the attributes of `Plugin` and an async generator `run(task, ctx)`. It yields
`TextDelta`, `Progress`, `Citation` and `Check` events; the executor adds everything else. `ctx` is its only
door to the world, so a run can be replayed from its journal: same `ctx`, same events.

Publish it under the entry-point group `onebox.plugins`; `onebox.testing` runs it without a server.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import Logger
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from onebox.events import Event, FinishReason, TextDelta
from onebox.messages import Message

if TYPE_CHECKING:  # which has examples of plugins
    from onebox.capabilities import Capabilities

API: int = 1
ENTRY_POINT_GROUP = "onebox.plugins"
Lang = Literal["en", "zh"]


@dataclass(frozen=True, slots=True)
class Example:
    """A message a user could type, in one of the two languages of the interface."""

    lang: Lang
    text: str


class TaskParams(BaseModel):
    """Base of a plugin's typed options: one definition for the HTTP schema, the form and the router."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Params = TaskParams


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work.

    `messages` is the conversation, oldest first, the request last; `params` is an instance of the plugin's
    own `Params`; `sampling` is what the caller asked of the engine; `declined` says that the router takes it for a
    request for what cannot be done here.
    """

    messages: tuple[Message, ...]
    params: TaskParams
    sampling: "Sampling"
    declined: bool = False

    @property
    def text(self) -> str:
        """The request: the last message's text."""
        return self.messages[-1].text


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the engine draws tokens. `None` leaves the choice to the plugin, then to the engine.

    `top_logprobs` None asks for no log-probabilities, 0 for those of sampled tokens, n for n rivals each.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer of one engine call."""

    text: str
    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """A closed choice. `probabilities` covers every option and sums to 1."""

    option: str
    probabilities: Mapping[str, float] = field(default_factory=dict)


class LLM(Protocol):
    """The engine as a plugin sees it. Every call may raise `OneboxError`s."""

    @property
    def context_length(self) -> int:
        """Tokens that prompt and reply share."""
        ...

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[TextDelta, None]:
        """The reply as it is drawn. Leaving the iterator early frees the engine's slot."""
        ...

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """The whole reply. Independent calls may run side by side; the engine batches them."""
        ...

    async def choose(self, messages: Sequence[Message], options: Sequence[str]) -> Chosen:
        """The option the model finds likeliest, drawn by constrained decoding: never anything else."""
        ...

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the rendered prompt, chat template included."""
        ...


class Context(Protocol):
    """Everything a plugin may touch."""

    @property
    def llm(self) -> LLM:
        """The engine."""
        ...

    @property
    def random(self) -> Random:
        """Seeded per run."""
        ...

    @property
    def deadline_s(self) -> float:
        """Seconds left for the run."""
        ...

    @property
    def log(self) -> Logger:
        """Tagged with run and plugin."""
        ...

    def now(self) -> float:
        """Seconds since 1970, the same in a replay."""
        ...

    async def capabilities(self) -> "Capabilities":
        """What the box can do now, how well and how fast, and what it cannot."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One 512-dimensional unit vector per text (Universal Sentence Encoder, 16 languages)."""
        ...

    async def retrieve(self, query: str, passages: Sequence[str], limit: int) -> list[int]:
        """Indices of the `limit` passages nearest to `query`, best first."""
        ...

    async def get(self, key: str) -> str | None:
        """A value this plugin has put for this tenant."""
        ...

    async def put(self, key: str, value: str) -> None:
        """Keep a value for this plugin and tenant."""
        ...


class Plugin(ABC):
    """One task. Subclass it, fill the attributes, write `run`."""

    name: ClassVar[str]
    version: ClassVar[str]
    api: ClassVar[int] = API
    title: ClassVar[Mapping[Lang, str]]
    summary: ClassVar[Mapping[Lang, str]]
    examples: ClassVar[Sequence[Example]]
    counter_examples: ClassVar[Sequence[Example]] = ()
    Params: ClassVar[type[TaskParams]] = TaskParams

    @abstractmethod
    def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        """Do the work; an async generator. Raise an `OneboxError` to end the run with a clear message."""
