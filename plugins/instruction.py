"""Tells what a message asks for from the text it asks it about: "Summarize this: ..." has both in one.

The rules look at form alone: a short first or last line with a task's verb, a colon, a quotation. What a task's verbs
are is the task's own business.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from onebox.messages import Message

LINE_MAX: Final = 240
TEXT_MIN: Final = 40
_COLON: Final = re.compile(r"\A([^\n]{1,240}?)(?:：|:(?!//)(?!\d))\s*(?=\S)")
_QUOTED: Final = re.compile(r"“([^”]+)”|「([^」]+)」|『([^』]+)』|\"([^\"\n]+)\"|(?<!\w)'([^'\n]+)'(?!\w)|`([^`\n]+)`")
_OPENING: Final = '“「『(（《"`'
_CLOSING: Final = '”」』)）》"`'
_POINTERS: Final = (
    r"\b(?:please|pls|kindly|can|could|would|will|you|help|me|i|want|need|to|for|us|a|an|the|this|that|these|those|it|them|following"
    r"|above|below|previous|last|first|text|texts|article|passage|paragraphs?|sentences?|words?|message|answer|reply|content|document|story"
    r"|email|letter|note|notes|what|whole|of|in|into|with|and|from|about|at|most|least|one|two|three|four|five|six|ten|just|only|now|again"
    r"|short|shorter|brief|briefly|long|longer|simple|quick|quickly|some|few|more|less|concise|detailed|bullets?|points?|list|form|as)\b"
    r"|请你?|麻烦|帮我|帮忙|帮|给我|替我|把|将|对|用|我想要?|我要|你|我|能不能|能否|可以|可否|吗|呢|吧|啊|一下|一遍|一段|一篇|这个|这些|这|那|下面|以下|下列|下文|上面|以上"
    r"|上述|上文|前面|前文|刚才|刚刚|后面|文章|文本|文字|内容|段落|段|句子|句话|句|话|篇|的|里|中|全文|原文|回答|回复|邮件|材料|资料|新闻|故事|信|文|成|为|出|到|做|进行|简单|简短"
    r"|简要|详细|一些|几个|几条|几点|条|个|字|左右|以内|不超过|之内|大概|大约|一|两|三|四|五|六|十"
)
_POINTER: Final = re.compile(_POINTERS, re.IGNORECASE)
_CONTENT: Final = re.compile(r"[^\W\d_]")


@dataclass(frozen=True, slots=True)
class Request:
    """What to do, and the text to do it to; either may be empty."""

    instruction: str
    payload: str


def split_request(text: str, verbs: re.Pattern[str]) -> Request:
    """The instruction and the text in a message; `verbs` finds what makes a line an instruction."""
    text = text.strip()
    if quoted := _split_quoted(text, verbs):
        return quoted
    colon = _COLON.match(text)
    if colon and verbs.search(colon.group(1)) and _balanced(colon.group(1)):
        return Request(colon.group().strip(), text[colon.end() :].strip())
    lines = text.split("\n")
    if len(lines) > 1:
        first, last = lines[0].strip(), lines[-1].strip()
        if len(first) <= LINE_MAX and verbs.search(first):
            return Request(first, "\n".join(lines[1:]).strip())
        if len(last) <= LINE_MAX and verbs.search(last):
            return Request(last, "\n".join(lines[:-1]).strip())
    if len(text) <= LINE_MAX and verbs.search(text):
        return Request(text, "")
    return Request("", text)


def is_bare(instruction: str, verbs: re.Pattern[str]) -> bool:
    """Whether nothing but verbs and pointers is in it: "summarize this for me" is, "summarize Hamlet" is not."""
    return not _CONTENT.search(_POINTER.sub(" ", verbs.sub(" ", instruction)))


def earlier_text(messages: Sequence[Message]) -> Message | None:
    """The newest message before the request that is long enough to be a text to work on."""
    for message in reversed(messages[:-1]):
        if message.role != "system" and len(message.text.encode()) >= TEXT_MIN:
            return message
    return None


def _split_quoted(text: str, verbs: re.Pattern[str]) -> Request | None:
    quotes = list(_QUOTED.finditer(text))
    if len(quotes) != 1:
        return None
    around = f"{text[: quotes[0].start()]} {text[quotes[0].end() :]}"
    if not (verbs.search(around) and is_bare(around, verbs)):
        return None
    return Request(around.strip(), next(group for group in quotes[0].groups() if group))


def _balanced(text: str) -> bool:
    opened = sum(text.count(mark) for mark in _OPENING[:-2]) == sum(text.count(mark) for mark in _CLOSING[:-2])
    return opened and not any(text.count(mark) % 2 for mark in '"`')
