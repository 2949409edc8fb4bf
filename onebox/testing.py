"""Runs a plugin without a server, a model or a network: a scripted `ctx` answers in place of the engine.

    events = await collect(Haiku(), "rain", replies=["Soft rain on the roof"])
    assert text_of(events) == "Soft rain on the roof"

Nothing here judges what a real model would answer. The real `ctx` is `agents.context`.
"""

import logging
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random
from typing import Final, Literal

from onebox.capabilities import Capabilities, LanguageAbility, Limits, Speed, TaskAbility
from onebox.contract import find_faults
from onebox.events import Check, Citation, Event, Progress, TextDelta
from onebox.messages import Message, user
from onebox.plugin import Chosen, Completion, Example, Plugin, Sampling, Task

__all__ = [
    "Call",
    "ScriptedContext",
    "ScriptedLLM",
    "check_plugin",
    "check_replay",
    "collect",
    "find_faults",
    "text_of",
]

Reply = str | Exception | Callable[[Sequence[Message]], str]
PLUGIN_EVENTS: Final = (TextDelta, Progress, Citation, Check)
DIMENSIONS: Final = 512
UNSET: Final = Sampling()
_PIECE: Final = re.compile(r"\s*\S{1,6}|\s+")
_WORD: Final = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True)
class Call:
    """One engine call the plugin made."""

    kind: Literal["stream", "complete", "choose"]
    messages: tuple[Message, ...]
    sampling: Sampling = UNSET
    options: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """All messages' texts, joined by newlines."""
        return "\n".join(message.text for message in self.messages)


class ScriptedLLM:
    """Answers each call with the next reply; a reply that is an exception is raised, a function is asked."""

    def __init__(self, replies: Sequence[Reply], context_length: int) -> None:
        self._replies = list(replies)
        self._context_length = context_length
        self.calls: list[Call] = []
        self.counts = 0

    @property
    def context_length(self) -> int:
        """Tokens that prompt and reply share."""
        return self._context_length

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[TextDelta, None]:
        """The next reply, in pieces of a few characters."""
        text = self._answer(Call("stream", tuple(messages), sampling))
        for piece in _PIECE.findall(text):
            yield TextDelta(piece)

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """The next reply, whole."""
        text = self._answer(Call("complete", tuple(messages), sampling))
        return Completion(text, "stop", _count(messages), len(text))

    async def choose(self, messages: Sequence[Message], options: Sequence[str]) -> Chosen:
        """The next reply, which must be one of the options."""
        option = self._answer(Call("choose", tuple(messages), options=tuple(options)))
        assert option in options, f"The script answers {option!r}, which is not one of {list(options)!r}."
        return Chosen(option, {each: float(each == option) for each in options})

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """One token per three bytes, and four per message."""
        self.counts += 1
        return _count(messages)

    def _answer(self, call: Call) -> str:
        self.calls.append(call)
        made = len(self.calls)
        assert made <= len(self._replies), (
            f"The plugin made engine call {made}; the script has {len(self._replies)} replies."
        )
        reply = self._replies[made - 1]
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, str) else reply(call.messages)


ABILITIES: Final = Capabilities(
    "ready",
    ("scripted",),
    (
        TaskAbility(
            "chat",
            {"en": "Chat", "zh": "聊天"},
            {"en": "Talk", "zh": "聊聊"},
            (Example("en", "Hi!"), Example("zh", "你好！")),
        ),
    ),
    (LanguageAbility("zh"), LanguageAbility("en")),
    Limits(4096, 1024, 1 << 20, 512, 3, 600.0),
    Speed(),
    {"en": ("See.",), "zh": ("看图。",)},
)


@dataclass
class ScriptedContext:
    """A `Context` whose every answer is written down beforehand."""

    replies: Sequence[Reply] = ()
    context_length: int = 4096
    seed: int = 0
    clock_s: float = 1_767_225_600.0
    deadline_s: float = 600.0
    values: dict[str, str] = field(default_factory=dict)
    abilities: Capabilities = ABILITIES
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("onebox.testing"))

    def __post_init__(self) -> None:
        self.llm = ScriptedLLM(self.replies, self.context_length)
        self.random = Random(self.seed)

    @property
    def calls(self) -> list[Call]:
        """The engine calls so far."""
        return self.llm.calls

    def now(self) -> float:
        """Always `clock_s`."""
        return self.clock_s

    async def capabilities(self) -> Capabilities:
        """Always `abilities`."""
        return self.abilities

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Unit vectors by the hash of each character pair: near for texts that share many."""
        return [_embed(text) for text in texts]

    async def retrieve(self, query: str, passages: Sequence[str], limit: int) -> list[int]:
        """The passages that share most character pairs with the query."""
        asked = _embed(query)
        nearness = [sum(a * b for a, b in zip(asked, _embed(passage), strict=True)) for passage in passages]
        return sorted(range(len(passages)), key=lambda index: -nearness[index])[:limit]

    async def get(self, key: str) -> str | None:
        """A value put before."""
        return self.values.get(key)

    async def put(self, key: str, value: str) -> None:
        """Keep a value."""
        self.values[key] = value


async def collect(
    plugin: Plugin,
    text: str,
    *,
    before: Sequence[Message] = (),
    params: Mapping[str, object] | None = None,
    sampling: Sampling = UNSET,
    replies: Sequence[Reply] = (),
    ctx: ScriptedContext | None = None,
) -> list[Event]:
    """All events of one run; `before` is the conversation so far. Pass `ctx` to look at its `calls` afterwards.

    Raises:
        AssertionError: the plugin sent an event that is not a plugin's to send, or made a call beyond the script.
    """
    task = Task((*before, user(text)), plugin.Params.model_validate(dict(params or {})), sampling)
    seen: list[Event] = []
    async with aclosing(plugin.run(task, ctx or ScriptedContext(replies))) as events:
        async for event in events:
            assert isinstance(event, PLUGIN_EVENTS), f"{event!r} is not a plugin's to send."
            seen.append(event)
    return seen


def text_of(events: Sequence[Event]) -> str:
    """The reply: all text deltas, joined."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def check_replay(
    plugin: Plugin,
    text: str,
    *,
    replies: Sequence[Reply],
    before: Sequence[Message] = (),
    params: Mapping[str, object] | None = None,
    context_length: int = 4096,
) -> list[Event]:
    """The events of a run, after a second run over the same script proved to make the same calls and events.

    Raises:
        AssertionError: the runs differ: something non-deterministic did not come from `ctx`.
    """
    first, second = (ScriptedContext(replies, context_length=context_length) for _ in range(2))
    seen = await collect(plugin, text, before=before, params=params, ctx=first)
    again = await collect(plugin, text, before=before, params=params, ctx=second)
    assert first.calls == second.calls, "The same script led to other engine calls."
    assert seen == again, "The same script led to other events."
    return seen


def check_plugin(cls: type[Plugin]) -> None:
    """Nothing when the registry would let the class in.

    Raises:
        AssertionError: names each fault and its remedy.
    """
    faults = find_faults(cls)
    assert not faults, f"{cls.__name__}: " + " ".join(faults)


def _count(messages: Sequence[Message]) -> int:
    return sum(4 + -(-len(message.text.encode()) // 3) for message in messages)


def _embed(text: str) -> list[float]:
    letters = "".join(_WORD.findall(text.lower()))
    vector = [0.0] * DIMENSIONS
    for index in range(len(letters) - 1):
        digest = sha256(letters[index : index + 2].encode()).digest()
        vector[int.from_bytes(digest[:2], "big") % DIMENSIONS] += 1.0
    norm = sum(value * value for value in vector) ** 0.5
    return [value / norm for value in vector] if norm else vector
