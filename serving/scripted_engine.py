"""The scripted engine: replies that are a pure function of seed, prompt and position, paced by knobs.

It is the load-test engine and the test twin of `serving.vllm_engine`; it is not a model and understands nothing. A
token is about one English word or Chinese character. Structured replies are well-formed, log-probabilities made up.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import NoReturn
from zlib import crc32

import orjson

from onebox.errors import BadRequest, EngineFailed, PromptTooLong, Unavailable
from onebox.events import Alternative, FinishReason, Token
from onebox.settings import Settings
from serving.adapters import unknown_adapter
from serving.engine import Batch
from serving.prefix_cache import PrefixCache
from serving.protocol import (
    End,
    Frame,
    GenerateRequest,
    ModelCard,
    TokenizeReply,
    TokenizeRequest,
    WireMessage,
)
from serving.schema_instance import minimal_instance

CONTEXT_LENGTH = 8192
FRAME_MAX_TOKENS = 64
NATURAL_LENGTH = (256, 256)  # shortest reply in tokens, and by how much one may be longer
VOCABULARY_IDS = 1 << 20

_PIECE = re.compile(r"\s*[A-Za-z0-9_']+|\s*[^\sA-Za-z0-9_']|\s+")
_CJK = re.compile(r"[\u3400-\u9fff]")
_ENGLISH_WORDS = """
the a this that one box word answer text page line note plan idea reader writer day year city river light road market
garden window letter question story number table paper winter morning is was has makes gives shows keeps finds brings
holds and or but so when while because with from into over under near after before clear short long plain early quiet
small large new old good useful careful simple open steady
"""
_CHINESE_WORDS = """
的 一 是 在 有 我们 这个 那个 可以 需要 问题 回答 文字 时间 地方 城市 河流 早晨 春天 道路 市场 花园 窗户 信件 故事 数字
读者 作者 计划 想法 先 再 也 就 都 和 与 因为 所以 如果 但是 然后 清楚 简单 安静 新 旧 大 小 好 慢慢 认真 说明 看见 找到
带来 写下
"""
_ENGLISH = _ENGLISH_WORDS.split()
_CHINESE = _CHINESE_WORDS.split()


@dataclass(frozen=True, slots=True)
class Faults:
    """At which token of a reply (from 0) to misbehave; None: never. `crash` kills the engine for every request."""

    fail_at_token: int | None = None
    hang_at_token: int | None = None
    crash_at_token: int | None = None

    def first_at(self, index: int) -> bool:
        """Whether token `index` is not produced because of one of the faults."""
        return index in (self.fail_at_token, self.hang_at_token, self.crash_at_token)


@dataclass(frozen=True, slots=True)
class _Script:
    """A reply before it is spoken: token `i` is `piece(i)`, `length` tokens in all."""

    piece: Callable[[int], str]
    length: int
    finish: FinishReason

    def text(self, start: int, end: int) -> str:
        return "".join(self.piece(index) for index in range(start, end))


class ScriptedEngine:
    """Implements `serving.engine.Engine`."""

    def __init__(self, settings: Settings, *, faults: Faults | None = None) -> None:
        self._ttft_s = settings.scripted_ttft_ms / 1000
        self._itl_s = settings.scripted_itl_ms / 1000
        self._context_length = settings.model_context or CONTEXT_LENGTH
        self._max_ongoing = settings.engine_max_ongoing
        self._max_queued = settings.engine_max_queued
        self._slots = asyncio.Semaphore(settings.engine_max_ongoing)
        self._faults = faults or Faults()
        self._dead = asyncio.Event()
        self._prefill_s = settings.scripted_prefill_us / 1e6
        self._cache = PrefixCache(settings.scripted_cache_tokens)
        self._in_work = 0  # tokens of prompts and replies
        self._adapters = tuple(settings.adapters)

    def model_card(self) -> ModelCard:
        """The card of the scripted engine."""
        return ModelCard(
            id="scripted",
            engine="scripted",
            context_length=self._context_length,
            dtype="text",
            chat_template=True,
            max_ongoing=self._max_ongoing,
            max_queued=self._max_queued,
            adapters=self._adapters,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Batch, None]:
        """The scripted reply at its pace; a late consumer gets several tokens at once, so the pace is kept."""
        await self.check()
        if request.adapter is not None and request.adapter not in self._adapters:
            raise unknown_adapter(request.adapter, self._adapters)
        prompt = _prompt_key(request)
        pieces = _prompt_pieces(request)
        prompt_tokens = len(pieces)
        resumed = len(request.resume_token_ids)
        room = self._context_length - prompt_tokens - resumed
        if room < 1 and self._context_length > prompt_tokens:
            yield (End("length", prompt_tokens, 0),)
            return
        if room < 1:
            raise PromptTooLong(
                f"The prompt has {prompt_tokens + resumed} tokens and the context holds {self._context_length}: "
                "no room is left for a reply. Shorten the conversation or the text."
            )
        script = _write_script(request, prompt, limit=resumed + min(request.sampling.max_tokens, room))
        async with self._slots, self._working(request, pieces, script.length) as prefill_s:
            clock = asyncio.get_running_loop().time
            start_s = clock() + self._ttft_s + prefill_s
            index = resumed
            while index < script.length:
                await self._wait_until(start_s + (index - resumed) * self._itl_s, clock)
                if self._faults.first_at(index):
                    await self._misbehave(index)
                end = min(script.length, index + FRAME_MAX_TOKENS)
                if self._itl_s > 0:
                    due = int((clock() - start_s) / self._itl_s + 1e-6) + 1 + resumed
                    end = min(end, max(due, index + 1))
                end = next((at for at in range(index + 1, end) if self._faults.first_at(at)), end)
                frame = _frame(script, index, end, request.sampling.top_logprobs)
                index = end
                if index < script.length:
                    yield (frame,)
                else:
                    self._keep_reply(request, script)
                    yield frame, End(script.finish, prompt_tokens, index - resumed)
            if resumed >= script.length:
                yield (End(script.finish, prompt_tokens, 0),)

    async def settle(self) -> None:
        """Nothing to wait for: a reply's slot is free when its generator is closed."""

    def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        """Ids and pieces; about one per word or Chinese character."""
        if (request.messages is None) == (request.text is None):
            raise BadRequest("Give exactly one of 'messages' and 'text'.")
        text = request.text if request.text is not None else _render(request.messages or ())
        pieces = _PIECE.findall(text)
        return TokenizeReply(count=len(pieces), ids=tuple(map(_token_id, pieces)), pieces=tuple(pieces))

    async def check(self) -> None:
        """Raises `Unavailable` after a crash fault."""
        if self._dead.is_set():
            raise Unavailable("The engine is dead. It is restarted; try again shortly.", retry_after_s=2)

    def kv_use(self) -> float:
        """By the tokens in work; 0 without a prefix cache, whose size is that of the KV cache."""
        return min(1.0, self._in_work / self._cache.tokens) if self._cache.tokens else 0.0

    def metrics(self) -> bytes:
        """The counters of the prefix cache."""
        counters = (("queried", self._cache.queried), ("hit", self._cache.hits))
        lines = (
            f"# HELP onebox_engine_prefix_{name}_tokens_total Prompt tokens {name} in the prefix cache\n"
            f"# TYPE onebox_engine_prefix_{name}_tokens_total counter\n"
            f"onebox_engine_prefix_{name}_tokens_total {count}\n"
            for name, count in counters
        )
        return "".join(lines).encode()

    async def close(self) -> None:
        """Ends every running reply."""
        self._dead.set()

    async def _wait_until(self, due_s: float, clock: Callable[[], float]) -> None:
        await asyncio.sleep(max(0.0, due_s - clock()))
        if self._dead.is_set():
            raise EngineFailed("The engine died in the middle of the reply. Try again.")

    async def _misbehave(self, index: int) -> NoReturn:
        if index == self._faults.crash_at_token:
            self._dead.set()
        if index == self._faults.hang_at_token:
            await self._dead.wait()
        raise EngineFailed(f"The engine broke off the reply at token {index}. Try again.")

    @asynccontextmanager
    async def _working(self, request: GenerateRequest, pieces: list[str], length: int) -> AsyncIterator[float]:
        """Has the request's tokens in the KV cache; the time that those take which were not there before."""
        uncached = len(pieces) - self._cache.look_up(pieces, request.cache_salt)
        self._cache.keep(pieces, request.cache_salt)
        tokens = len(pieces) + length
        self._in_work += tokens
        try:
            yield uncached * self._prefill_s
        finally:
            self._in_work -= tokens

    def _keep_reply(self, request: GenerateRequest, script: "_Script") -> None:
        """The tokens of a whole reply stay too: the prompt of the next turn begins with them."""
        if self._cache.tokens and request.messages is not None:
            said = _render(request.messages) + script.text(0, script.length)
            self._cache.keep(_PIECE.findall(said), request.cache_salt)


def _prompt_pieces(request: GenerateRequest) -> list[str]:
    if request.prompt_token_ids is not None:
        return [str(token) for token in request.prompt_token_ids]
    return _PIECE.findall(_render(request.messages or ()))


def _render(messages: tuple[WireMessage, ...]) -> str:
    return "".join(f"<{message.role}>\n{message.content}\n" for message in messages) + "<assistant>\n"


def _token_id(piece: str) -> int:
    return crc32(piece.encode("utf-8", "surrogatepass")) % VOCABULARY_IDS


def _prompt_key(request: GenerateRequest) -> bytes:
    """Identifies seed, adapter and prompt; language and words of the reply follow from it."""
    prompt = orjson.dumps(request.prompt_token_ids) if request.messages is None else _render(request.messages).encode()
    if request.adapter is not None:
        prompt = request.adapter.encode() + b"\n" + prompt
    return blake2b(prompt, digest_size=16, salt=str(request.sampling.seed or 0).encode()[:16]).digest()


def _draw(key: bytes, index: int, purpose: bytes = b"") -> int:
    return int.from_bytes(blake2b(index.to_bytes(8, "big"), digest_size=8, key=key, person=purpose).digest(), "big")


def _write_script(request: GenerateRequest, key: bytes, limit: int) -> _Script:
    pieces: list[str] | None = None
    if request.structured is not None and request.structured.choice is not None:
        options = request.structured.choice
        pieces = _PIECE.findall(options[_draw(key, 0, b"choice") % len(options)])
    elif request.structured is not None and request.structured.json_schema is not None:
        try:
            pieces = _PIECE.findall(orjson.dumps(minimal_instance(request.structured.json_schema)).decode())
        except ValueError as error:
            raise BadRequest(f"The JSON schema is not usable: {error}. Correct the schema.") from None
    if pieces is not None:
        whole = pieces
        finish: FinishReason = "stop" if len(whole) <= limit else "length"
        script = _Script(lambda index: whole[index], min(len(whole), limit), finish)
    else:
        shortest, spread = NATURAL_LENGTH
        natural = limit if request.sampling.ignore_eos else shortest + _draw(key, 0, b"length") % spread
        write = _chinese_piece if _is_chinese(request) else _english_piece
        finish = "stop" if natural < limit else "length"
        script = _Script(lambda index: write(key, index), min(natural, limit), finish)
    return _cut_at_stop(script, request.sampling.stop)


def _cut_at_stop(script: _Script, stops: tuple[str, ...]) -> _Script:
    """The script up to the first of `stops`: the text before it, however it lies across tokens."""
    if not stops:
        return script
    text = script.text(0, script.length)
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    if not found:
        return script
    cut, pieces, length = min(found), list[str](), 0
    while length < cut:
        piece = script.piece(len(pieces))[: cut - length]
        pieces.append(piece)
        length += len(piece)
    return _Script(lambda index: pieces[index], len(pieces), "stop")


def _is_chinese(request: GenerateRequest) -> bool:
    return request.messages is not None and _CJK.search(request.messages[-1].content) is not None


def _ends_sentence(key: bytes, index: int) -> bool:
    return _draw(key, index, b"stop") % 12 == 0


def _english_piece(key: bytes, index: int) -> str:
    word = _ENGLISH[_draw(key, index) % len(_ENGLISH)]
    if index == 0 or _ends_sentence(key, index - 1):
        word = word.capitalize()
    mark = "." if _ends_sentence(key, index) else "," if _draw(key, index, b"comma") % 16 == 0 else ""
    return f"{'' if index == 0 else ' '}{word}{mark}"


def _chinese_piece(key: bytes, index: int) -> str:
    word = _CHINESE[_draw(key, index) % len(_CHINESE)]
    mark = "。" if _ends_sentence(key, index) else "，" if _draw(key, index, b"comma") % 16 == 0 else ""
    return word + mark


def _frame(script: _Script, start: int, end: int, top_logprobs: int | None) -> Frame:
    pieces = [script.piece(index) for index in range(start, end)]
    ids = tuple(map(_token_id, pieces))
    tokens = () if top_logprobs is None else tuple(_token(piece, top_logprobs) for piece in pieces)
    return Frame("".join(pieces), ids, tokens)


def _token(piece: str, rivals: int) -> Token:
    """The piece with a made-up log-probability, itself the likeliest of its `rivals`."""
    seed = _token_id(piece)
    logprob = -0.001 - seed % 500 / 1000
    top = [Alternative(piece, seed, logprob)]
    for rank in range(1, rivals):
        other = _ENGLISH[(seed + rank) % len(_ENGLISH)]
        top.append(Alternative(other, _token_id(other), logprob - rank))
    return Token(piece, seed, logprob, tuple(top[:rivals]))
