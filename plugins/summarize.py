"""Summaries. A text that fits the model's context takes one streamed call; a longer one is cut into parts that are
summarized side by side, then their summaries become one, in as many rounds as it takes.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import ClassVar, Final, Literal

from pydantic import Field

from onebox.events import Event, Progress, TextDelta
from onebox.messages import Message, system, user
from onebox.plugin import Context, Example, Lang, Plugin, Sampling, Task, TaskParams
from plugins.chunks import split_to_fit
from plugins.history import fits, room_for_prompt, stream_reply, with_temperature
from plugins.instruction import Request, earlier_text, is_bare, split_request
from plugins.language import language_named, reply_lang
from plugins.prompts import Prompts

TEMPERATURE: Final = 0.0
PARTS_AT_ONCE: Final = 8
PART_TOKENS: Final = 256
ROUNDS_MAX: Final = 8
PROMPT_TOKENS: Final = 160

VERBS: Final = re.compile(
    r"\b(?:summar\w+|tl;?dr|condense|recap|digest|outline|gist|abridge|boil \w+ down"
    r"|key (?:points|takeaways|facts)|takeaways|main (?:points?|ideas?)|shorten)\b"
    r"|总结|總結|概括|摘要|归纳|概述|要点|提炼|梳理|大意|缩写|小结|中心思想|主旨|(?:主要)?讲了?(?:些)?什么|核心(?:观点|内容)?",
    re.IGNORECASE,
)


class Summarize(Plugin):
    """Makes a text shorter and keeps what matters."""

    name = "summarize"
    version = "1.0"
    title: ClassVar[Mapping[Lang, str]] = {"en": "Summarize", "zh": "总结"}
    summary: ClassVar[Mapping[Lang, str]] = {
        "en": "Make a text of any length short, as prose or bullets",
        "zh": "把任意长度的文字变短，成段或列要点",
    }
    examples = (
        Example(
            "en",
            "Summarize in one sentence: The city council voted on Tuesday to build 12 new bike lanes. The project "
            "costs 4 million dollars and starts in spring. Shop owners worry about parking, cyclists welcome it.",
        ),
        Example(
            "en",
            "Give me the key points as bullets: Bees pollinate about a third of the food we eat. Their numbers "
            "fall because of pesticides and lost meadows. Gardeners help by planting native flowers and not spraying.",
        ),
        Example(
            "en",
            "TL;DR: We met on Monday. Ana will finish the report by Friday, Ben orders the new laptops, and "
            "the launch moves from May 3 to May 17 because testing is late.",
        ),
        Example(
            "en",
            "Summarize this for a child: The Moon pulls on the sea. Where it pulls, the water rises, and as the Earth "
            "turns, each coast meets high water and low water about twice a day.",
        ),
        Example(
            "zh",
            "用一句话总结：市议会周二投票决定新建12条自行车道。工程耗资四百万美元，"
            "将于春天开工。店主担心停车位减少，骑行者则表示欢迎。",
        ),
        Example(
            "zh",
            "列出要点：蜜蜂为我们三分之一的食物授粉。由于农药和草地消失，它们的数量正在下降。"
            "园丁可以种本地花卉、少用农药来帮助它们。",
        ),
        Example(
            "zh",
            "帮我归纳会议内容：周一开会决定，安娜周五前完成报告，小本采购新电脑，"
            "因测试延误，发布日期从5月3日推迟到5月17日。",
        ),
        Example(
            "zh",
            "请概括这段话的大意：月亮吸引海水，被吸引的地方水位上升。"
            "随着地球自转，每个海岸每天大约经历两次涨潮和两次落潮。",
        ),
    )
    counter_examples = (
        Example("en", "Translate this summary into German: Sales rose by ten percent."),
        Example("en", "Write a long story about a summer in the city."),
        Example("zh", "把这段摘要翻译成英文：销售额增长了百分之十。"),
        Example("zh", "写一篇关于夏天的长故事。"),
    )

    class Params(TaskParams):
        """How long, in what form, in which language; `auto` follows the message."""

        length: Literal["auto", "short", "medium", "long"] = "auto"
        words: int | None = Field(None, ge=5, le=2000, description="Words, or characters in Chinese; beats `length`.")
        format: Literal["auto", "paragraph", "bullets"] = "auto"
        language: str | None = Field(None, description="Code or name, such as 'fr' or 'French'; unset: the message's.")

    def __init__(self) -> None:
        self._prompts = Prompts(self.name)

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        """One call for a short text, many for a long one, none where there is no text."""
        assert isinstance(task.params, self.Params)
        request = split_request(task.text, VERBS)
        lang = reply_lang(request.instruction or request.payload)
        if not request.payload and is_bare(request.instruction, VERBS):
            earlier = earlier_text(task.messages)
            if earlier is None:
                yield TextDelta(self._prompts.text("no_text", lang))
                return
            request = Request(request.instruction, earlier.text)
        wish = " ".join(
            [request.instruction.rstrip(":： ") or self._prompts.text("ask", lang), *self._wishes(task.params, lang)]
        )
        rules = self._prompts.text("system", lang)
        if not request.payload:
            async with aclosing(stream_reply(ctx, task, rules, temperature=TEMPERATURE)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        text = request.payload
        room = room_for_prompt(ctx.llm, task.sampling) - PROMPT_TOKENS
        if not await fits(ctx.llm, [system(rules), user(wish), user(text)], room):
            async with aclosing(self._condense(ctx, task, text, lang, room)) as work:
                async for item in work:
                    if isinstance(item, Progress):
                        yield item
                    else:
                        text = item
            rules = self._prompts.text("merge", lang)
        message = user(self._prompts.text("work", lang, wish=wish, text=text))
        async with aclosing(stream_reply(ctx, task, rules, temperature=TEMPERATURE, messages=[message])) as deltas:
            async for delta in deltas:
                yield delta

    def _wishes(self, params: "Summarize.Params", lang: Lang) -> list[str]:
        wishes = []
        if params.words:
            wishes.append(self._prompts.text("words", lang, words=params.words))
        elif params.length != "auto":
            wishes.append(self._prompts.text(params.length, lang))
        if params.format != "auto":
            wishes.append(self._prompts.text(params.format, lang))
        if params.language:
            language = language_named(params.language)
            wishes.append(
                self._prompts.text("language", lang, language=language.name(lang) if language else params.language)
            )
        return wishes

    async def _condense(
        self, ctx: Context, task: Task, text: str, lang: Lang, room: int
    ) -> AsyncGenerator[Progress | str, None]:
        """Progress for each part read, then once the summaries of all parts, short enough for one prompt."""
        rules = system(self._prompts.text("system", lang))
        draw = with_temperature(
            Sampling(max_tokens=min(PART_TOKENS, max(32, room // 6)), seed=task.sampling.seed), TEMPERATURE
        )
        done = total = 0
        for _ in range(ROUNDS_MAX):
            parts = await split_to_fit(ctx.llm, text, room)
            if len(parts) == 1:
                break
            total += len(parts)
            prompts = [[rules, user(self._prompts.text("part", lang, text=part.strip()))] for part in parts]
            yield Progress(done, total, self._prompts.text("reading", lang, done=done, total=total))
            summaries: dict[int, str] = {}
            async with aclosing(_complete_all(ctx, prompts, draw)) as completed:
                async for index, summary in completed:
                    summaries[index], done = summary, done + 1
                    yield Progress(done, total, self._prompts.text("reading", lang, done=done, total=total))
            text = "\n\n".join(summaries[index].strip() for index in range(len(parts)))
        yield text


async def _complete_all(
    ctx: Context, prompts: Sequence[Sequence[Message]], sampling: Sampling
) -> AsyncGenerator[tuple[int, str], None]:
    """Each prompt's answer with its index, as they come, a few side by side.

    No TaskGroup: it would cancel whoever reads, if a call failed while this generator stands at a yield. The `finally`
    owns the calls instead.
    """
    gate = asyncio.Semaphore(PARTS_AT_ONCE)

    async def complete(index: int, prompt: Sequence[Message]) -> tuple[int, str]:
        async with gate:
            return index, (await ctx.llm.complete(prompt, sampling)).text

    calls = [asyncio.create_task(complete(index, prompt)) for index, prompt in enumerate(prompts)]
    try:
        for finished in asyncio.as_completed(calls):
            yield await finished
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
