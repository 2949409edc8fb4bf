"""What a plugin is given: the engine as `EngineLLM`, and everything else as `RunContext`.

Both belong to one run, and whatever they answer that is not a pure function of the run is in its `agents.journal`. The
contract is `onebox.plugin`; a scripted twin for tests is in `onebox.testing`.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

from agents.encoder import Encoder
from agents.engine import Card, EngineClient
from agents.generation import End, Frame, Generation
from agents.journal import Entry, Journal
from agents.store import Store
from onebox.errors import BadRequest, EngineFailed, OneboxError, from_code
from onebox.events import Alternative, FinishReason, TextDelta, Token
from onebox.messages import Message
from onebox.plugin import Chosen, Completion, Sampling

CHOICE_RIVALS: Final = 20
CHOICE_MAX_TOKENS: Final = 32


@dataclass(slots=True)
class Meter:
    """What a run has cost so far, how its last engine call ended, and what its open calls may still draw."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: FinishReason = "stop"
    rooms: dict[str, int] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)

    def begin(self, key: str, room: int) -> None:
        """A call opens that may draw `room` tokens."""
        self.rooms[key], self.drawn[key] = room, 0

    def draw(self, key: str, count: int) -> None:
        """An open call drew tokens."""
        self.drawn[key] += count
        self.completion_tokens += count

    def end(self, key: str, end: End) -> None:
        """A call is whole."""
        self.prompt_tokens += end.prompt_tokens
        self.completion_tokens += end.completion_tokens - self.drawn[key]
        self.finish = end.finish
        self.drawn[key] = end.completion_tokens

    def close(self, key: str) -> None:
        """A call is over, whole or not."""
        del self.rooms[key], self.drawn[key]

    @property
    def open_tokens(self) -> int:
        """Tokens drawn by the calls that are open."""
        return sum(self.drawn.values())

    @property
    def open_room(self) -> int:
        """Tokens that the open calls may still draw."""
        return sum(self.rooms[key] - drawn for key, drawn in self.drawn.items())


class EngineLLM:
    """The engine for one run; implements `onebox.plugin.LLM`."""

    def __init__(
        self,
        engine: EngineClient,
        card: Card,
        meter: Meter,
        journal: Journal,
        name: str,
        tenant: str,
        session: str | None,
        room: int,
    ) -> None:
        self._engine = engine
        self._card = card
        self._meter = meter
        self._journal = journal
        self._name = name
        self._tenant = tenant
        self._session = session
        self._room = room
        self._calls = 0

    @property
    def context_length(self) -> int:
        """Tokens that prompt and reply share."""
        return self._card.context_length

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[TextDelta, None]:
        """The reply as it is drawn. Leaving the iterator early frees the engine's slot."""
        key = self._journal.open("stream", *messages, sampling)
        async with aclosing(self._items(key, messages, sampling)) as items:
            async for item in items:
                if isinstance(item, Frame):
                    yield TextDelta(item.text, item.tokens)

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """The whole reply."""
        key = self._journal.open("complete", *messages, sampling)
        pieces: list[str] = []
        end: End | None = None
        async with aclosing(self._items(key, messages, sampling)) as items:
            async for item in items:
                if isinstance(item, Frame):
                    pieces.append(item.text)
                else:
                    end = item
        assert end is not None, "a reply ends with End or raises"
        return Completion("".join(pieces), end.finish, end.prompt_tokens, end.completion_tokens)

    async def choose(self, messages: Sequence[Message], options: Sequence[str]) -> Chosen:
        """The likeliest option by constrained decoding, with a probability for each from the tokens' rivals."""
        if not options:
            raise BadRequest("There is nothing to choose from: give at least one option.")
        key = self._journal.open("choose", *messages, *options)
        if (entry := await self._journal.answer(key)) is not None:
            option, shares, *end = _valued(entry)
            self._meter.begin(key, 0)
            self._meter.end(key, End(*end))
            self._meter.close(key)
            return Chosen(option, shares)
        sampling = Sampling(max_tokens=CHOICE_MAX_TOKENS, temperature=0.0, top_logprobs=CHOICE_RIVALS)
        pieces: list[str] = []
        tokens: list[Token] = []
        whole: End | None = None
        call = self._call(messages, sampling, options)
        self._meter.begin(key, call.max_tokens)
        try:
            async with aclosing(self._engine.generate(call)) as items:
                async for item in items:
                    if isinstance(item, Frame):
                        pieces.append(item.text)
                        tokens.extend(item.tokens)
                        self._meter.draw(key, item.count)
                    else:
                        whole = item
                        self._meter.end(key, item)
        finally:
            self._meter.close(key)
        assert whole is not None, "a reply ends with End or raises"
        text = "".join(pieces)
        option = text if text in options else text.strip()
        if option not in options:
            raise EngineFailed(f"The engine answered {text[:80]!r}, which is not one of the options. Try again.")
        shares = share(options, option, tokens)
        spent = [whole.finish, whole.prompt_tokens, whole.completion_tokens]
        self._journal.note(key, "value", [option, shares, *spent])
        return Chosen(option, shares)

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the rendered prompt, chat template included."""
        key = self._journal.open("count_tokens", *messages)
        if (entry := await self._journal.answer(key)) is not None:
            return int(_valued(entry))
        count = await self._engine.count_tokens(messages)
        self._journal.note(key, "value", count)
        return count

    async def _items(
        self, key: str, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncGenerator[Frame | End, None]:
        """What the journal has of a reply, then the rest of it from the engine."""
        journal, meter = self._journal, self._meter
        call = self._call(messages, sampling, None)
        meter.begin(key, call.max_tokens)
        try:
            resume: list[int] = []
            while (entry := await journal.answer(key)) is not None:
                if entry.kind == "end":
                    end = End(*entry.value)
                    meter.end(key, end)
                    yield end
                    return
                frame = _frame(_valued(entry))
                resume += frame.ids
                meter.draw(key, frame.count)
                yield frame
            async with aclosing(self._engine.generate(replace(call, resume=resume))) as items:
                async for item in items:
                    if isinstance(item, Frame):
                        journal.note(key, "frame", [item.text, item.ids, item.tokens])
                        meter.draw(key, item.count)
                    else:
                        journal.note(key, "end", [item.finish, item.prompt_tokens, item.completion_tokens])
                        meter.end(key, item)
                    yield item
        except OneboxError as error:
            journal.note_error(key, error)
            raise
        finally:
            meter.close(key)

    def _call(self, messages: Sequence[Message], sampling: Sampling, choice: Sequence[str] | None) -> Generation:
        self._calls += 1
        return Generation(
            request_id=f"{self._name}-{self._calls}",
            messages=messages,
            sampling=sampling,
            max_tokens=sampling.max_tokens or self._room,
            choice=choice,
            cache_salt=self._tenant,
            session=self._session,
        )


def _valued(entry: Entry) -> Any:
    """The value of a journal entry. Raises the error that is one."""
    if entry.kind == "error":
        code, message = entry.value
        raise from_code(code, message)
    return entry.value


def _frame(value: Sequence[Any]) -> Frame:
    text, ids, tokens = value
    return Frame(text, tuple(ids), tuple(map(_token, tokens)))


def _token(row: Mapping[str, Any]) -> Token:
    top = tuple(Alternative(**rival) for rival in row["top"])
    return Token(row["text"], row["id"], row["logprob"], top)


class RunContext:
    """Everything a plugin may touch in one run; implements `onebox.plugin.Context`."""

    def __init__(
        self,
        llm: EngineLLM,
        journal: Journal,
        encoder: Encoder,
        store: Store,
        run_id: str,
        tenant: str,
        plugin: str,
        deadline: float,
        logger: logging.Logger,
    ) -> None:
        self._llm = llm
        self._journal = journal
        self._encoder = encoder
        self._store = store
        self._deadline = deadline
        self._values = f"onebox:{{{tenant}}}:plugin:{plugin}"
        self._random = Random(run_id)
        self._log = _tagged(logger, plugin, run_id)

    @property
    def llm(self) -> EngineLLM:
        """The engine."""
        return self._llm

    @property
    def random(self) -> Random:
        """Seeded per run."""
        return self._random

    @property
    def deadline_s(self) -> float:
        """Seconds left for the run."""
        left_s: float = self._journal.quick("deadline", lambda: max(0.0, self._deadline - time.time()))
        return left_s

    @property
    def log(self) -> logging.Logger:
        """Tagged with run and plugin."""
        return self._log

    def now(self) -> float:
        """Seconds since 1970, the same in a replay."""
        now_s: float = self._journal.quick("now", time.time)
        return now_s

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One 512-dimensional unit vector per text."""
        if not texts:
            return []
        vectors: list[list[float]] = (await asyncio.to_thread(self._encoder.embed, texts)).tolist()
        return vectors

    async def retrieve(self, query: str, passages: Sequence[str], limit: int) -> list[int]:
        """Indices of the `limit` passages nearest to `query` by cosine, best first."""
        if not passages or limit < 1:
            return []
        vectors = await asyncio.to_thread(self._encoder.embed, [query, *passages])
        nearness = vectors[1:] @ vectors[0]
        order: list[int] = (-nearness).argsort(kind="stable")[:limit].tolist()
        return order

    async def get(self, key: str) -> str | None:
        """A value this plugin has put for this tenant."""
        call = self._journal.open("get", self._values, key)
        if (entry := await self._journal.answer(call)) is not None:
            return None if entry.value is None else str(entry.value)
        raw = await self._store.hash_get(self._values, key)
        value = raw.decode() if raw is not None else None
        self._journal.note(call, "value", value)
        return value

    async def put(self, key: str, value: str) -> None:
        """Keep a value for this plugin and tenant."""
        await self._store.hash_set(self._values, key, value)


def _tagged(base: logging.Logger, plugin: str, run_id: str) -> logging.Logger:
    """A logger of its own for one run: logging's registry would keep every run's name for ever."""
    logger = logging.Logger(f"{base.name}.{plugin}.{run_id}")
    logger.parent = base
    return logger


def share(options: Sequence[str], chosen: str, tokens: Sequence[Token]) -> dict[str, float]:
    """How likely each option was, from the chosen one's tokens and their rivals; sums to 1.

    The chosen text is walked token by token. At each token, an option that goes another way takes the probability of
    the rival it begins with, split among the options that share it; the rest of the mass goes on with the chosen one.
    """
    weights = dict.fromkeys(options, 0.0)
    alive = [option for option in options if option != chosen]
    mass, position = 1.0, 0
    for token in tokens:
        if not alive:
            break
        text = token.text if position else token.text.lstrip()
        leaving = [option for option in alive if not option.startswith(text, position)]
        for rival in token.top:
            way = rival.text if position else rival.text.lstrip()
            if rival.id == token.id or not way:
                continue
            takers = [option for option in leaving if option.startswith(way, position)]
            for option in takers:
                weights[option] += mass * math.exp(rival.logprob) / len(takers)
        alive = [option for option in alive if option not in leaving]
        mass *= math.exp(token.logprob)
        position += len(text)
    weights[chosen] = mass / (len(alive) + 1) if tokens else 1.0
    for option in alive if tokens else ():
        weights[option] += mass / (len(alive) + 1)
    total = sum(weights.values())
    if total <= 0.0:
        return {option: float(option == chosen) for option in options}
    return {option: weight / total for option, weight in weights.items()}
