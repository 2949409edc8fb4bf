"""Drafts of letters, stories, poems, posts: one streamed call; the wishes are the user's words plus the options."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import ClassVar, Final, Literal

from pydantic import Field

from onebox.events import Event
from onebox.messages import user
from onebox.plugin import Context, Example, Lang, Plugin, Task, TaskParams
from plugins.history import stream_reply
from plugins.language import language_named, reply_lang
from plugins.prompts import Prompts

TEMPERATURE: Final = 0.7


class Write(Plugin):
    """Drafts texts."""

    name = "write"
    version = "1.0"
    title: ClassVar[Mapping[Lang, str]] = {"en": "Write", "zh": "写作"}
    summary: ClassVar[Mapping[Lang, str]] = {
        "en": "Draft letters, stories, poems and posts",
        "zh": "起草邮件、故事、诗歌和文案",
    }
    examples = (
        Example("en", "Write a short poem about autumn rain."),
        Example("en", "Write a friendly email asking my neighbour to water my plants for a week."),
        Example("en", "Write three slogans for a small bakery."),
        Example("en", "Write a very short story about a robot who learns to paint."),
        Example("zh", "写一首关于秋雨的短诗。"),
        Example("zh", "写一封简短的请假邮件，理由是感冒。"),
        Example("zh", "为一家小面包店写三条广告语。"),
        Example("zh", "写一个机器人学画画的小故事。"),
    )
    counter_examples = (
        Example("en", "Who wrote the poem The Road Not Taken?"),
        Example("en", "Summarize this email: The meeting moves to Friday at ten."),
        Example("zh", "《静夜思》是谁写的？"),
        Example("zh", "总结这封邮件：会议改到周五十点。"),
    )

    class Params(TaskParams):
        """How it should sound; `auto` follows the message."""

        tone: Literal["auto", "neutral", "formal", "friendly", "humorous", "poetic"] = "auto"
        length: Literal["auto", "short", "medium", "long"] = "auto"
        words: int | None = Field(None, ge=5, le=4000, description="Words, or characters in Chinese; beats `length`.")
        language: str | None = Field(
            None, description="Code or name of the language to write in; unset: the message's."
        )

    def __init__(self) -> None:
        self._prompts = Prompts(self.name)

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        """The draft."""
        params = task.params
        assert isinstance(params, self.Params)
        lang = reply_lang(task.text)
        wishes = [self._prompts.text(params.tone, lang)] if params.tone != "auto" else []
        if params.words:
            wishes.append(self._prompts.text("words", lang, words=params.words))
        elif params.length != "auto":
            wishes.append(self._prompts.text(params.length, lang))
        if params.language:
            language = language_named(params.language)
            wishes.append(
                self._prompts.text("language", lang, language=language.name(lang) if language else params.language)
            )
        request = "\n".join([task.text, *([" ".join(wishes)] if wishes else [])])
        messages = [*task.messages[:-1], user(request)]
        rules = self._prompts.text("system", lang)
        async with aclosing(stream_reply(ctx, task, rules, temperature=TEMPERATURE, messages=messages)) as deltas:
            async for delta in deltas:
                yield delta
