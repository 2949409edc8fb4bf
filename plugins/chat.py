"""Small talk, and honesty about what this box is: a language model that predicts text and does nothing else.

Small models forget that and make up the weather even when told not to (tried with 0.5B parameters). So what the router
declines, and a short message that plainly asks for live data, an action or the box's abilities, is answered without the
engine; in a longer one the fact travels with the message.
"""

import re
import tomllib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from importlib.resources import files
from typing import ClassVar, Final

from onebox.capabilities import Capabilities
from onebox.events import Event, TextDelta
from onebox.messages import user
from onebox.plugin import Context, Example, Lang, Plugin, Task
from plugins.history import stream_reply
from plugins.language import LanguageDetector, language_named, reply_lang
from plugins.prompts import Prompts

TEMPERATURE: Final = 0.7
SHORT: Final = 80

_ABILITIES: Final = re.compile(
    r"\bwhat (?:can|do) you do\b|\bwho are you\b|\bwhat are you\b|\byour (?:abilities|capabilities|features|limits)\b"
    r"|\bhow (?:can|could) you help\b|\bwhat (?:else )?can (?:i|we) (?:ask|use) you\b|\A\s*help\s*[.!?]*\s*\Z"
    r"|你(?:能|会|可以)(?:帮我)?(?:做|干)?(?:些)?什么|你是谁|你是什么|(?:什么|哪些)功能|你有什么用|\A\s*帮助\s*\Z",
    re.IGNORECASE,
)
_LIVE: Final = re.compile(
    r"\bweather (?:in|today|tomorrow|now|forecast|like)\b|(?:what|how)(?:'s| is| will) (?:the |it )?weather"
    r"|\b(?:latest|today'?s|breaking|current) (?:news|score|price|rate|headlines)\b"
    r"|\bnews today\b|\bstock price\b"
    r"|\bexchange rate\b|\bwhat (?:time|day|date) is it\b|\b(?:today'?s|current) (?:date|time)\b"
    r"|\bprice of \w+ (?:now|today)\b"
    r"|天气(?:怎么样|如何|预报|好吗)|(?:今天|今日|最新|实时).{0,6}(?:新闻|股价|汇率|比分|行情|油价)|(?:股价|汇率)(?:是|多少)"
    r"|现在几点|几点了|今天(?:是)?(?:几号|星期几|周几|几月几)",
    re.IGNORECASE,
)
_ACTION: Final = re.compile(
    r"\b(?:set|start) (?:me )?(?:an? |the )?(?:alarm|timer|reminder)\b|\bwake me\b|\bremind me\b"
    r"|\b(?:send|forward) (?:an? |the |this )?(?:email|message|mail|text)\b"
    r"|\b(?:book|order|buy|reserve) (?:me |us )?(?:a|an|the|some)\b"
    r"|\bturn (?:on|off)\b|\bplay (?:some |a )?(?:music|song)\b"
    r"|\b(?:call|phone|ring) (?:my|the)\b|\bsearch (?:the )?(?:web|internet|online)\b"
    r"|(?:定|设)(?:个|一个)?闹钟|提醒我|帮我(?:发|寄|打电话|订|买|下单|预约|叫车|点外卖)|播放"
    r"|(?:打开|关掉|关上)(?:灯|空调|电视)|上网(?:查|搜)",
    re.IGNORECASE,
)
_FACTS: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    ("live", _LIVE),
    ("action", _ACTION),
    ("abilities", _ABILITIES),
)


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
        Example("en", "Good morning! How are you?"),
        Example("zh", "你好！你能做什么？"),
        Example("zh", "说点关于星期一的好话吧。"),
        Example("zh", "我今天有点累，给我打打气！"),
        Example("zh", "早上好，最近怎么样？"),
    )
    counter_examples = (
        Example("en", "Why do cats purr?"),
        Example("en", "Translate 'hello, friend' into Italian."),
        Example("zh", "猫为什么会打呼噜？"),
        Example("zh", "把“你好，朋友”翻译成意大利语。"),
    )

    def __init__(self) -> None:
        self._prompts = Prompts(self.name)
        self._declined: Mapping[str, Mapping[str, str]] = tomllib.loads(
            (files("plugins.prompts") / "declined.toml").read_text(encoding="utf-8")
        )
        self._detector = LanguageDetector()

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        """The next line of the conversation."""
        lang = reply_lang(task.text)
        fact = next((name for name, pattern in _FACTS if pattern.search(task.text)), None)
        if task.declined or (fact in {"live", "action"} and len(task.text) <= SHORT):
            yield TextDelta(self._no(task.text, fact))
            return
        if fact == "abilities" and len(task.text) <= SHORT:
            yield TextDelta(self._abilities(await ctx.capabilities(), lang))
            return
        request = f"{task.text}\n{self._prompts.text(fact, lang)}" if fact else task.text
        messages = [*task.messages[:-1], user(request)]
        rules = self._prompts.text("system", lang)
        async with aclosing(stream_reply(ctx, task, rules, temperature=TEMPERATURE, messages=messages)) as deltas:
            async for delta in deltas:
                yield delta

    def _no(self, text: str, fact: str | None) -> str:
        """An honest no, and what is possible instead, in the language of the request."""
        language = self._detector.detect(text)
        texts = self._declined.get(language.code if language is not None else "en", self._declined["en"])
        return texts.get(fact or "other", texts["other"])

    def _abilities(self, known: Capabilities, lang: Lang) -> str:
        """The object of `GET /v1/capabilities` in words."""
        text = self._prompts.text
        rows = []
        for task in known.tasks:
            example = next((one.text for one in task.examples if one.lang == lang), "")
            rows.append(text("task_row", lang, title=task.title[lang], summary=task.summary[lang], example=example))
        parts = [text("who", lang, model=known.models[0] if known.models else "—"), "\n".join(rows)]
        parts.append(text("cannot", lang) + "\n" + "\n".join(f"- {line}" for line in known.cannot[lang]))
        if known.languages:
            names = (language_named(one.code) for one in known.languages)
            listed = (", " if lang == "en" else "、").join(name.name(lang) for name in names if name is not None)
            parts.append(text("languages", lang, languages=listed))
        limits = known.limits
        parts.append(text("limits", lang, context=limits.context_tokens or "—", reply=limits.reply_tokens))
        if known.quality is not None:
            right = f"{100 * known.quality.routed_right:.0f}"
            parts.append(text("quality", lang, right=right, messages=known.quality.messages))
        if known.speed.tokens_per_s is not None:
            first, pace = f"{known.speed.first_text_s:.1f}", f"{known.speed.tokens_per_s:.0f}"
            parts.append(text("speed", lang, first=first, pace=pace))
        return "\n\n".join(parts)
