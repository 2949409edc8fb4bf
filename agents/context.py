"""What a plugin is given: the engine as `EngineLLM`, and everything else as `RunContext`.

Both belong to one run. The contract is `onebox.plugin`; a scripted twin for tests is in `onebox.testing`.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Final

from agents.encoder import Encoder
from agents.engine import Card, End, EngineClient, Frame, Generation
from agents.store import Store
from onebox.errors import BadRequest, EngineFailed
from onebox.events import FinishReason, TextDelta, Token
from onebox.messages import Message
from onebox.plugin import Chosen, Completion, Sampling

CHOICE_RIVALS: Final = 20
CHOICE_MAX_TOKENS: Final = 32


@dataclass(slots=True)
class Meter:
    """What a run has cost so far, and how its last engine call ended."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: FinishReason = "stop"


class EngineLLM:
    """The engine for one run; implements `onebox.plugin.LLM`."""

    def __init__(
        self, engine: EngineClient, card: Card, meter: Meter, run_id: str, tenant: str, session: str | None, room: int
    ) -> None:
        self._engine = engine
        self._card = card
        self._meter = meter
        self._run_id = run_id
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
        meter, drawn = self._meter, 0
        async with aclosing(self._engine.generate(self._call(messages, sampling, None))) as frames:
            async for frame in frames:
                if isinstance(frame, Frame):
                    drawn += frame.count
                    meter.completion_tokens += frame.count
                    yield TextDelta(frame.text, frame.tokens)
                else:
                    meter.prompt_tokens += frame.prompt_tokens
                    meter.completion_tokens += frame.completion_tokens - drawn
                    meter.finish = frame.finish

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """The whole reply."""
        text, _, end = await self._whole(self._call(messages, sampling, None))
        return Completion(text, end.finish, end.prompt_tokens, end.completion_tokens)

    async def choose(self, messages: Sequence[Message], options: Sequence[str]) -> Chosen:
        """The likeliest option by constrained decoding, with a probability for each from the tokens' rivals."""
        if not options:
            raise BadRequest("There is nothing to choose from: give at least one option.")
        sampling = Sampling(max_tokens=CHOICE_MAX_TOKENS, temperature=0.0, top_logprobs=CHOICE_RIVALS)
        text, tokens, _ = await self._whole(self._call(messages, sampling, options))
        option = text if text in options else text.strip()
        if option not in options:
            raise EngineFailed(f"The engine answered {text[:80]!r}, which is not one of the options. Try again.")
        return Chosen(option, share(options, option, tokens))

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the rendered prompt, chat template included."""
        return await self._engine.count_tokens(messages)

    async def _whole(self, call: Generation) -> tuple[str, list[Token], End]:
        end: End | None = None
        pieces: list[str] = []
        tokens: list[Token] = []
        async with aclosing(self._engine.generate(call)) as frames:
            async for frame in frames:
                if isinstance(frame, Frame):
                    pieces.append(frame.text)
                    tokens.extend(frame.tokens)
                else:
                    self._meter.prompt_tokens += frame.prompt_tokens
                    self._meter.completion_tokens += frame.completion_tokens
                    self._meter.finish = frame.finish
                    end = frame
        assert end is not None, "generate ends with End or raises"
        return "".join(pieces), tokens, end

    def _call(self, messages: Sequence[Message], sampling: Sampling, choice: Sequence[str] | None) -> Generation:
        self._calls += 1
        return Generation(
            request_id=f"{self._run_id}-{self._calls}",
            messages=messages,
            sampling=sampling,
            max_tokens=sampling.max_tokens or self._room,
            choice=choice,
            cache_salt=self._tenant,
            session=self._session,
        )


class RunContext:
    """Everything a plugin may touch in one run; implements `onebox.plugin.Context`."""

    def __init__(
        self,
        llm: EngineLLM,
        encoder: Encoder,
        store: Store,
        run_id: str,
        tenant: str,
        plugin: str,
        deadline: float,
        logger: logging.Logger,
    ) -> None:
        self._llm = llm
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
        return max(0.0, self._deadline - time.monotonic())

    @property
    def log(self) -> logging.Logger:
        """Tagged with run and plugin."""
        return self._log

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

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
        value = await self._store.hash_get(self._values, key)
        return value.decode() if value is not None else None

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
