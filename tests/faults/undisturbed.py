"""The text a run has when nothing disturbs it: the real plugin on the real scripted engine, in this process.

No wire, no store, no pace. What the product answers in a storm must be this, byte for byte.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from random import Random
from typing import Final

from onebox.events import TextDelta
from onebox.messages import Message
from onebox.plugin import Chosen, Completion, Plugin, Sampling, Task
from onebox.settings import Settings
from onebox.testing import ScriptedContext
from plugins.registry import load_plugins
from serving.protocol import End, Frame, GenerateRequest, TokenizeRequest, WireMessage, WireSampling
from serving.scripted_engine import ScriptedEngine

RAW_MODEL: Final = "scripted"


class Undisturbed:
    """Texts by model and messages."""

    def __init__(self) -> None:
        self._settings = Settings.model_validate({"scripted_ttft_ms": 0, "scripted_itl_ms": 0})
        self._engine = ScriptedEngine(self._settings)
        self._plugins: dict[str, Plugin] = dict(load_plugins(self._settings.plugins))
        self._known: dict[tuple[str, tuple[Message, ...], int], str] = {}

    async def text(self, model: str, messages: Sequence[Message], max_tokens: int) -> str:
        """The whole reply of `model` to `messages`."""
        asked = (model, tuple(messages), max_tokens)
        if asked not in self._known:
            self._known[asked] = await self._draw(*asked)
        return self._known[asked]

    async def _draw(self, model: str, messages: tuple[Message, ...], max_tokens: int) -> str:
        llm, sampling = _LLM(self._engine, self._settings), Sampling(max_tokens=max_tokens)
        if model == RAW_MODEL:
            return "".join([delta.text async for delta in llm.stream(messages, sampling)])
        plugin, context = self._plugins[model], ScriptedContext()
        context.llm = llm  # type: ignore[assignment]  # the same protocol, another engine
        context.random, context.log = Random("run"), logging.getLogger("undisturbed")
        pieces: list[str] = []
        async with aclosing(plugin.run(Task(messages, plugin.Params(), sampling), context)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    pieces.append(event.text)
        return "".join(pieces)


class _LLM:
    """The scripted engine as a plugin sees it."""

    def __init__(self, engine: ScriptedEngine, settings: Settings) -> None:
        self._engine = engine
        self.context_length = engine.model_card().context_length
        self._room = min(settings.max_tokens_default, self.context_length)

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[TextDelta, None]:
        request = GenerateRequest(
            request_id="undisturbed",
            messages=_wire(messages),
            sampling=WireSampling(max_tokens=sampling.max_tokens or self._room, seed=sampling.seed, stop=sampling.stop),
        )
        self.end: End | None = None
        async with aclosing(self._engine.generate(request)) as batches:
            async for batch in batches:
                for item in batch:
                    if isinstance(item, Frame):
                        yield TextDelta(item.text)
                    else:
                        self.end = item

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        text = "".join([delta.text async for delta in self.stream(messages, sampling)])
        assert self.end is not None
        return Completion(text, self.end.finish, self.end.prompt_tokens, self.end.completion_tokens)

    async def choose(self, messages: Sequence[Message], options: Sequence[str]) -> Chosen:
        raise NotImplementedError("no task of the storm makes a choice")

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        return self._engine.tokenize(TokenizeRequest(messages=_wire(messages))).count


def _wire(messages: Sequence[Message]) -> tuple[WireMessage, ...]:
    return tuple(WireMessage(role=message.role, content=message.text) for message in messages)
