"""Answers to questions: from a text where the message or the conversation holds one, else from what the model knows.

A text longer than the context is searched, and only the nearest passages are shown to the model. Sentences that carry
the answer come back as citations.
"""

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from pydantic import Field

from onebox.events import Citation, Event, TextDelta
from onebox.messages import Message, system, user
from onebox.plugin import Context, Example, Lang, Plugin, Task, TaskParams
from plugins.chunks import Span, passages, sentences
from plugins.history import fits, room_for_prompt, stream_reply
from plugins.language import reply_lang
from plugins.prompts import Prompts

TEMPERATURE: Final = 0.0
TEXT_MIN: Final = 120
PASSAGE_BYTES: Final = 600
PASSAGES_MAX: Final = 6
PROMPT_TOKENS: Final = 200
CITATIONS_MAX: Final = 3
SUPPORT_MIN: Final = 0.3

_QUESTION: Final = re.compile(
    r"[?？]\s*\Z|\A(?:question|q|问题|问)\s*[:：]"
    r"|\b(?:according to|based on|answer|from) (?:the|this|that)\b|(?:根据|依据|结合).{0,8}(?:文|材料|内容|段|话)",
    re.IGNORECASE,
)
_LABEL: Final = re.compile(
    r"(?:\A|\n)\s*(?:text|context|passage|article|文本|原文|材料|文章|短文|上下文)\s*[:：]\s*", re.IGNORECASE
)
_ASKED: Final = re.compile(r"(?:\A|\n)\s*(?:question|q|问题|问|提问)\s*[:：]\s*", re.IGNORECASE)
_FEATURE: Final = re.compile(r"\d[\d.,]*\d|\d|[^\W\d_\u3400-\u9fff]{3,}|[\u3400-\u9fff]+")
_HAN: Final = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True)
class Grounds:
    """A question and the text that should answer it, which begins at `start` in message `index`."""

    question: str
    text: str
    index: int
    start: int


class QA(Plugin):
    """Answers questions."""

    name = "qa"
    version = "1.0"
    title: ClassVar[Mapping[Lang, str]] = {"en": "Questions", "zh": "问答"}
    summary: ClassVar[Mapping[Lang, str]] = {
        "en": "Answer questions, from your text if you give one",
        "zh": "回答问题；给出文本时依据文本回答",
    }
    examples = (
        Example("en", "Why is the sky blue?"),
        Example("en", "What is the difference between a virus and a bacterium?"),
        Example(
            "en",
            "The Golden Gate Bridge opened in 1937. It is 2.7 km long and was the longest suspension bridge then. "
            "Its colour is called international orange.\n\nWhen did the bridge open?",
        ),
        Example("en", "Who wrote Romeo and Juliet?"),
        Example("zh", "为什么天空是蓝色的？"),
        Example("zh", "中国的首都是哪里？"),
        Example(
            "zh",
            "港珠澳大桥于2018年10月通车，全长55公里，连接香港、珠海和澳门，"
            "是世界上最长的跨海大桥之一。大桥设计使用寿命120年。\n\n大桥全长多少公里？",
        ),
        Example("zh", "病毒和细菌有什么区别？"),
    )
    counter_examples = (
        Example("en", "Write a poem about the blue sky."),
        Example("en", "Hi, how are you?"),
        Example("zh", "写一首关于蓝天的诗。"),
        Example("zh", "你好，最近怎么样？"),
    )

    class Params(TaskParams):
        """A text to answer from, and how much to say."""

        context: str | None = Field(None, description="A text the answer must come from.")
        detail: Literal["auto", "brief", "full"] = "auto"

    def __init__(self) -> None:
        self._prompts = Prompts(self.name)

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        """The answer, then the sentences of the text that carry it."""
        params = task.params
        assert isinstance(params, self.Params)
        lang = reply_lang(find_question(task.text).question if not params.context else task.text)
        wish = self._prompts.text(params.detail, lang) if params.detail != "auto" else ""
        grounds = await self._grounds(task, ctx, params.context)
        if grounds is None:
            messages = [*task.messages[:-1], user(f"{task.text}\n{wish}".strip())]
            rules = self._prompts.text("system", lang)
            shown: Sequence[Span] = ()
        else:
            shown = await self._show(ctx, task, grounds)
            text = "\n".join(span.text.strip() for span in shown)
            question = f"{grounds.question} {wish}".strip()
            messages = [user(self._prompts.text("grounded", lang, text=text, question=question))]
            rules = self._prompts.text("rules", lang)
        said: list[str] = []
        async with aclosing(stream_reply(ctx, task, rules, temperature=TEMPERATURE, messages=messages)) as deltas:
            async for delta in deltas:
                if isinstance(delta, TextDelta):
                    said.append(delta.text)
                yield delta
        if grounds is not None:
            source = f"messages[{grounds.index}]" if grounds.index >= 0 else "context"
            for sentence in support("".join(said), shown):
                start = grounds.start + sentence.start
                yield Citation(source, start, start + len(sentence.text), sentence.text)

    async def _grounds(self, task: Task, ctx: Context, context: str | None) -> Grounds | None:
        if context:
            return Grounds(task.text, context, -1, 0)
        last = len(task.messages) - 1
        found = find_question(task.text)
        if found.text:
            return Grounds(found.question, found.text, last, found.start)
        if await fits(ctx.llm, task.messages, room_for_prompt(ctx.llm, task.sampling) - PROMPT_TOKENS):
            return None
        return _long_text_before(task.messages, task.text)

    async def _show(self, ctx: Context, task: Task, grounds: Grounds) -> list[Span]:
        """The whole text where it fits, else its passages nearest to the question, in the text's order."""
        room = room_for_prompt(ctx.llm, task.sampling) - PROMPT_TOKENS
        if await fits(ctx.llm, [system(grounds.question), user(grounds.text)], room):
            return [Span(0, grounds.text)]
        size = min(PASSAGE_BYTES, max(100, room // 4))
        pieces = passages(grounds.text, size)
        limit = max(1, min(PASSAGES_MAX, (room - len(grounds.question.encode())) // size))
        nearest = await ctx.retrieve(grounds.question, [piece.text for piece in pieces], limit)
        return [pieces[index] for index in sorted(nearest)]


def find_question(text: str) -> Grounds:
    """The question in a message and the text it is about, empty where the message is a question alone."""
    label, asked = _LABEL.search(text), _ASKED.search(text)
    if label and asked:
        first, second = sorted((label, asked), key=lambda match: match.start())
        before, after = text[first.end() : second.start()].strip(), text[second.end() :].strip()
        passage, question = (before, after) if first is label else (after, before)
        return _placed(text, question, passage)
    if label and label.start() > 0:
        return _placed(text, text[: label.start()].strip(), text[label.end() :].strip())
    lines = text.strip().split("\n")
    if len(lines) > 1:
        first_line, last_line = lines[0].strip(), lines[-1].strip()
        if _QUESTION.search(last_line):
            return _placed(text, _ASKED.sub("", last_line).strip(), "\n".join(lines[:-1]).strip())
        if _QUESTION.search(first_line):
            return _placed(text, _ASKED.sub("", first_line).strip(), "\n".join(lines[1:]).strip())
    parts = sentences(text.strip())
    if len(parts) > 1 and _QUESTION.search(parts[-1].text):
        return _placed(text, parts[-1].text.strip(), text.strip()[: parts[-1].start].strip())
    return Grounds(text, "", 0, 0)


def support(answer: str, shown: Sequence[Span]) -> list[Span]:
    """The sentences that share most with the answer, as few as cover it, in the text's order."""
    wanted = _features(answer)
    candidates = [
        Span(span.start + sentence.start + _indent(sentence.text), sentence.text.strip())
        for span in shown
        for sentence in sentences(span.text)
    ]
    chosen: list[Span] = []
    left = set(wanted)
    while left and len(chosen) < CITATIONS_MAX and candidates:
        best = max(candidates, key=lambda span: (len(_features(span.text) & left), -len(span.text)))
        if len(_features(best.text) & left) < max(1.0, SUPPORT_MIN * len(wanted)):
            break
        chosen.append(best)
        left -= _features(best.text)
    return sorted(chosen, key=lambda span: span.start)


def _placed(message: str, question: str, passage: str) -> Grounds:
    if len(passage.encode()) < TEXT_MIN or not question:
        return Grounds(message, "", 0, 0)
    return Grounds(question, passage, 0, message.index(passage))


def _long_text_before(messages: Sequence[Message], question: str) -> Grounds | None:
    """The longest earlier message, which is why the conversation does not fit."""
    earlier = [(len(message.text), index) for index, message in enumerate(messages[:-1]) if message.role == "user"]
    if not earlier:
        return None
    _, index = max(earlier)
    return Grounds(question, messages[index].text, index, 0)


def _features(text: str) -> set[str]:
    """Numbers, words of three letters and more, pairs of Han characters."""
    features: set[str] = set()
    for word in _FEATURE.findall(text.lower()):
        if _HAN.match(word) and len(word) > 1:
            features.update(word[index : index + 2] for index in range(len(word) - 1))
        else:
            features.add(word)
    return features


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())
