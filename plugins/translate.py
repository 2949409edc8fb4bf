"""Translations that keep a text's form: paragraph by paragraph, list by list, code and placeholders untouched."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import ClassVar, Final, Literal

from pydantic import Field

from onebox.events import Check, Event, Progress, TextDelta
from onebox.messages import Message, system, user
from onebox.plugin import Context, Example, Lang, Plugin, Task, TaskParams
from plugins.chunks import split_text
from plugins.history import with_temperature
from plugins.instruction import earlier_text
from plugins.language import CHINESE, ENGLISH, Language, LanguageDetector, language_named, reply_lang, target_language
from plugins.markup import Segment, lost, protected, split_markup, split_protected
from plugins.prompts import Prompts
from plugins.translation_request import extra_wish, split_translation

TEMPERATURE: Final = 0.0
CHUNK_BYTES: Final = 1200
PROGRESS_FROM: Final = 3


class Translate(Plugin):
    """Says the same in another language."""

    name = "translate"
    version = "1.0"
    title: ClassVar[Mapping[Lang, str]] = {"en": "Translate", "zh": "翻译"}
    summary: ClassVar[Mapping[Lang, str]] = {
        "en": "Translate between languages and keep the form",
        "zh": "在多种语言之间翻译，保留格式",
    }
    examples = (
        Example("en", "Translate into Chinese: Good morning! Would you like a cup of tea?"),
        Example("en", "Translate into French: The train to Paris leaves at nine o'clock."),
        Example("en", 'How do you say "I am very happy to meet you" in Spanish?'),
        Example("en", "Translate into English: 学而时习之，不亦说乎？"),
        Example("zh", "翻译成英文：今天天气很好，我们去公园散步吧。"),
        Example("zh", "把“谢谢你的帮助”翻译成法语"),
        Example("zh", "翻译成中文：Good morning! Would you like a cup of tea?"),
        Example("zh", "“我很喜欢这座城市”用西班牙语怎么说？"),
    )
    counter_examples = (
        Example("en", "What is the difference between French and Spanish?"),
        Example("en", "Write an English poem about the sea."),
        Example("zh", "英语和法语有什么区别？"),
        Example("zh", "用英文写一首关于大海的诗。"),
    )

    class Params(TaskParams):
        """Languages by code or name; unset: the source is detected, the target read from the message."""

        target: str | None = Field(None, description="Code or name of the language to translate into.")
        source: str | None = Field(None, description="Code or name of the text's language.")
        tone: Literal["auto", "formal", "informal"] = "auto"

    def __init__(self) -> None:
        self._prompts = Prompts(self.name)
        self._detector = LanguageDetector()

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        """The translation, piece after piece, and a check that what had to stay has stayed."""
        params = task.params
        assert isinstance(params, self.Params)
        request = split_translation(task.text)
        lang = reply_lang(request.instruction or request.payload)
        text = request.payload
        if not text:
            earlier = earlier_text(task.messages)
            if earlier is None:
                yield TextDelta(self._prompts.text("no_text", lang))
                return
            text = earlier.text
        source = language_named(params.source) or self._detector.detect(text)
        target = self._target(params.target, request.instruction, source)
        rules = system(self._prompts.text("system", lang, target=_name(target, lang)))
        ask = self._ask(params, request.instruction, source, target, lang)
        pieces = [part for segment in split_markup(text) for part in _cut(segment)]
        todo = sum(not piece.kept for piece in pieces)
        done = 0
        missing: list[str] = []
        for piece in pieces:
            if piece.kept:
                yield TextDelta(piece.text)
                continue
            if todo >= PROGRESS_FROM:
                yield Progress(done, todo, self._prompts.text("working", lang, done=done, total=todo))
            work = (
                self._guarded(task, ctx, rules, ask, piece.text)
                if protected(piece.text)
                else self._free(task, ctx, rules, ask, piece.text)
            )
            said: list[str] = []
            async with aclosing(work) as deltas:
                async for delta in deltas:
                    said.append(delta.text)
                    yield delta
            missing += lost(piece.text, "".join(said))
            done += 1
        if todo >= PROGRESS_FROM:
            yield Progress(done, todo, self._prompts.text("working", lang, done=done, total=todo))
        if protected(text):
            yield Check("kept", not missing, ", ".join(missing))

    def _target(self, asked: str | None, instruction: str, source: Language | None) -> Language | str:
        if asked:
            return language_named(asked) or asked
        if named := target_language(instruction):
            return named
        code = source.code if source else ""
        if code.startswith("zh") or (code != "en" and instruction and reply_lang(instruction) == "en"):
            return ENGLISH
        return CHINESE

    def _ask(
        self, params: "Translate.Params", instruction: str, source: Language | None, target: Language | str, lang: Lang
    ) -> str:
        known = source is not None and source != target
        ask = (
            self._prompts.text("from", lang, source=_name(source, lang), target=_name(target, lang))
            if known and source
            else self._prompts.text("into", lang, target=_name(target, lang))
        )
        extra = [extra_wish(instruction)] if instruction else []
        if params.tone != "auto":
            extra.append(self._prompts.text(params.tone, lang))
        return " ".join([ask, *filter(None, extra)])

    async def _free(
        self, task: Task, ctx: Context, rules: Message, ask: str, text: str
    ) -> AsyncGenerator[TextDelta, None]:
        """One piece of prose, streamed, without white space around it."""
        held, begun = "", False
        prompt = [rules, user(f"{ask}\n\n{text}")]
        async with aclosing(ctx.llm.stream(prompt, with_temperature(task.sampling, TEMPERATURE))) as deltas:
            async for delta in deltas:
                piece = held + (delta.text if begun else delta.text.lstrip())
                begun = begun or bool(piece)
                body = piece.rstrip()
                held = piece[len(body) :]
                if body or delta.tokens:
                    yield TextDelta(body, delta.tokens)

    async def _guarded(
        self, task: Task, ctx: Context, rules: Message, ask: str, text: str
    ) -> AsyncGenerator[TextDelta, None]:
        """One piece with URLs, placeholders or code; if the model loses one, the prose between is done alone."""
        prompt = [rules, user(f"{ask}\n\n{text}")]
        whole = await ctx.llm.complete(prompt, with_temperature(task.sampling, TEMPERATURE))
        if not lost(text, whole.text):
            yield TextDelta(whole.text.strip())
            return
        for segment in split_protected(text):
            if segment.kept:
                yield TextDelta(segment.text)
                continue
            async with aclosing(self._free(task, ctx, rules, ask, segment.text)) as deltas:
                async for delta in deltas:
                    yield delta


def _cut(segment: Segment) -> list[Segment]:
    """The segment in pieces short enough to be translated well, white space between them kept."""
    if segment.kept or len(segment.text.encode()) <= CHUNK_BYTES:
        return [segment]
    pieces = []
    for chunk in split_text(segment.text, CHUNK_BYTES):
        body = chunk.rstrip()
        pieces += [Segment(body, False)] if body else []
        pieces += [Segment(chunk[len(body) :], True)] if len(chunk) > len(body) else []
    return pieces


def _name(language: Language | str, lang: Lang) -> str:
    return language if isinstance(language, str) else language.name(lang)
