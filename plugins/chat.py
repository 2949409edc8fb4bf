"""Small talk, and honesty about what this box is: a language model that predicts text and does nothing else."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import ClassVar, Final

from onebox.events import Event
from onebox.plugin import Context, Example, Lang, Plugin, Task
from plugins.history import stream_reply
from plugins.language import reply_lang
from plugins.prompts import Prompts

TEMPERATURE: Final = 0.7


class Chat(Plugin):
    """Talks."""

    name = "chat"
    version = "1.0"
    title: ClassVar[Mapping[Lang, str]] = {"en": "Chat", "zh": "聊天"}
    summary: ClassVar[Mapping[Lang, str]] = {
        "en": "Talk, and ask what this box can do",
        "zh": "随便聊聊，问问它能做什么",
    }
    examples = (
        Example("en", "Hi! What can you do?"),
        Example("en", "Tell me something nice about Mondays."),
        Example("en", "I am a bit tired today. Cheer me up!"),
        Example("en", "How do you work?"),
        Example("zh", "你好！你能做什么？"),
        Example("zh", "夸夸星期一吧。"),
        Example("zh", "我今天有点累，给我打打气！"),
        Example("zh", "你是怎么工作的？"),
    )
    counter_examples = (
        Example("en", "Why do cats purr?"),
        Example("en", "Translate 'hello, friend' into Italian."),
        Example("zh", "猫为什么会打呼噜？"),
        Example("zh", "把“你好，朋友”翻译成意大利语。"),
    )

    def __init__(self) -> None:
        self._prompts = Prompts(self.name)

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        """The next line of the conversation."""
        rules = self._prompts.text("system", reply_lang(task.text))
        async with aclosing(stream_reply(ctx, task, rules, temperature=TEMPERATURE)) as deltas:
            async for delta in deltas:
                yield delta
