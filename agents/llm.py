"""The engine as the plugins of one run see it: `EngineLLM`, with the meter of what it costs.

Whatever an engine answers is in the run's `agents.journal`; which models there are is `agents.engines`. The rest of
what a plugin is given is `agents.context`; a scripted twin for tests is in `onebox.testing`.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from agents.admission import Claim
from agents.engines import Engines, Served
from agents.generation import End, Frame, Generation, affinity_key
from agents.journal import Entry, Journal, Kind
from agents.tracing import NO_TRACER, Tracer
from onebox.errors import BadRequest, EngineFailed, OneboxError, Unavailable, from_code
from onebox.events import Alternative, FinishReason, TextDelta, Token
from onebox.messages import Message
from onebox.plugin import Chosen, Completion, Sampling

CHOICE_RIVALS: Final = 20
CHOICE_MAX_TOKENS: Final = 32
ENGINE_PAUSE_S: Final = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run's open calls had got when it was stopped: tokens still to draw, drawn, and of the run in all."""

    room: int
    drawn: int
    total: int

    def ended(self, tokens: int | None, total: int) -> tuple[int, int]:
        """The run's tokens and those not generated.

        `tokens` is what the calls had drawn at their end, where the engine says it; `total` what has come meanwhile.
        """
        more = max((tokens or 0) - self.drawn, total - self.total)
        return self.total + more, max(0, self.room - more)


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

    def standing(self) -> Standing:
        """How far the open calls have got."""
        room = sum(self.rooms[key] - drawn for key, drawn in self.drawn.items())
        return Standing(room, sum(self.drawn.values()), self.completion_tokens)


class EngineLLM:
    """The engine for one run, at the model it is bound to; implements `onebox.plugin.LLM`.

    A call that has drawn nothing yet goes to the next model where its own is away, and the run stays there. The journal
    has each choice, so that another worker makes the same.
    """

    def __init__(
        self,
        engines: Engines,
        meter: Meter,
        journal: Journal,
        name: str,
        tenant: str,
        session: str | None,
        room: int,
        claim: Claim,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._engines = engines
        self._meter = meter
        self._journal = journal
        self._name = name
        self._tenant = tenant
        self._session = session
        self._room = room
        self._claim = claim
        self._tracer = tracer
        self._calls = 0
        self._names: Sequence[str] = ()
        self._served: Served | None = None

    async def bind(self, names: Sequence[str], patience_s: float = 0.0) -> None:
        """Take the first of these models that answers for the calls that follow, or the one the journal has.

        Raises:
            OneboxError: none of them does, not even after `patience_s`.
        """
        if self._served is not None and not self._engines.spec.several:
            return
        self._names = names
        until = time.monotonic() + patience_s
        key = self._journal.open("card")
        if (entry := await self._journal.answer(key)) is not None:
            self._served = Served(*entry.value)
            return
        while True:
            try:
                self._use(key, "value", await self._engines.choose(names))
                return
            except Unavailable:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(ENGINE_PAUSE_S)

    @property
    def context_length(self) -> int:
        """Tokens that prompt and reply share."""
        return self._bound.context_length

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
        if (entry := await self._answer(key)) is not None:
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
            async with aclosing(self._drawn(key, call)) as items:
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
        if (entry := await self._answer(key)) is not None:
            return int(_valued(entry))
        tried: list[str] = []
        while True:
            tried.append(self._bound.name)
            try:
                count = await self._engines.count_tokens(tried[-1], messages)
            except Unavailable as error:
                await self._move_on(key, tried, error)
            else:
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
            while (entry := await self._answer(key)) is not None:
                if entry.kind == "end":
                    end = End(*entry.value)
                    meter.end(key, end)
                    yield end
                    return
                frame = _frame(_valued(entry))
                resume += frame.ids
                meter.draw(key, frame.count)
                yield frame
            async with aclosing(self._drawn(key, replace(call, resume=resume))) as items:
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

    async def _drawn(self, key: str, call: Generation) -> AsyncGenerator[Frame | End, None]:
        """What the run's model draws, or the next one where that is away and the reply has not begun."""
        tried: list[str] = []
        away: Unavailable | None = None
        while True:
            name = self._bound.name
            tried.append(name)
            begun = bool(call.resume)
            others = not begun and any(other not in tried for other in self._names)
            try:
                async with aclosing(self._drawn_at(name, key, call, wary=others)) as items:
                    async for item in items:
                        begun = True
                        yield item
                return
            except Unavailable as error:
                if begun:
                    raise
                away = away or error
            except BadRequest as error:
                if away is not None:
                    raise away from error  # the call was made for the model that is away, and its context
                raise
            await self._move_on(key, tried, away)

    async def _drawn_at(
        self, name: str, key: str, call: Generation, *, wary: bool
    ) -> AsyncGenerator[Frame | End, None]:
        """What one model draws, once the run has a place there."""
        constrained = call.choice is not None
        model = self._engines.model_of(name)
        place = await self._claim.open(model, call.messages, call.max_tokens, constrained=constrained)
        end: End | None = None
        try:
            with self._span(call) as traced:
                async with aclosing(self._engines.generate(name, traced, wary=wary)) as items:
                    async for item in items:
                        if type(item) is End:
                            end = item
                        yield item
        finally:
            place.close(end, self._meter.drawn[key])

    async def _move_on(self, key: str, tried: Sequence[str], error: Unavailable) -> None:
        """Change to the next model that was not tried and answers. Raises `error` where there is none."""
        rest = [name for name in self._names if name not in tried]
        if not rest:
            raise error
        self._engines.pass_over(tried[-1])
        try:
            served = await self._engines.choose(rest)
        except Unavailable:
            raise error from None
        logger.warning("%s goes to model %r: %r is away", self._name, served.name, tried[-1])
        self._use(key, "model", served)

    def _use(self, key: str, kind: Kind, served: Served) -> None:
        self._journal.note(key, kind, [served.name, served.context_length])
        self._served = served

    async def _answer(self, key: str) -> Entry | None:
        """The journal's next answer to the call, after the changes of model that came before it."""
        while (entry := await self._journal.answer(key)) is not None and entry.kind == "model":
            self._served = Served(*entry.value)
        return entry

    @property
    def _bound(self) -> Served:
        assert self._served is not None, "EngineLLM is used before it has a model"
        return self._served

    @contextmanager
    def _span(self, call: Generation) -> Iterator[Generation]:
        """The call as the replica gets it: with the name of its own span, where one is recorded."""
        with self._tracer.span("generate", "client", current=False) as span:
            span.note(onebox__request=call.request_id, onebox__resumed=len(call.resume), onebox__model=self._bound.name)
            yield call if span.traceparent is None else replace(call, traceparent=span.traceparent)

    def _call(self, messages: Sequence[Message], sampling: Sampling, choice: Sequence[str] | None) -> Generation:
        self._calls += 1
        return Generation(
            request_id=f"{self._name}-{self._calls}",
            messages=messages,
            sampling=sampling,
            max_tokens=sampling.max_tokens or min(self._room, self.context_length),
            choice=choice,
            cache_salt=self._tenant,
            session=self._session,
            affinity=affinity_key(messages, self._tenant, self._session),
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
