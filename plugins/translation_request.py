"""What a translation request says: the text to translate, and what is said about how.

Beyond `plugins.instruction`, it knows the sentences that hold the text in their middle: 把我爱你翻译成英文,
"How do you say good night in French?"
"""

import re
from collections.abc import Sequence
from typing import Final

from plugins.instruction import LINE_MAX, Request, is_bare, split_request
from plugins.language import FROM, NAMES, TO

VERBS: Final = re.compile(
    rf"\btranslat\w*|翻译|翻譯|[译譯](?:成|为|為|文)|[中英]译|怎么说|怎么讲|如何表达|\bsay\b|{TO}|\A\s*(?:{NAMES})\s*[:：]?\s*\Z",
    re.IGNORECASE,
)
PLAIN: Final = re.compile(rf"{VERBS.pattern}|{FROM}|{NAMES}|\btranslation\b|\bhow do you\b", re.IGNORECASE)

_ASK: Final = r"\A(?:(?:please|pls|can you|could you|would you|help me|请你?|麻烦你?|能不能|帮我|给我|帮忙)[\s,，]*)*"
_END: Final = r"[\s。.!！?？]*(?:please|谢谢|thanks)?[\s。.!！?？]*\Z"
_SAY: Final = r"(?:怎么说|怎么讲|怎么写|如何说|如何表达|怎么表达|是什么)"
_INLINE: Final[Sequence[re.Pattern[str]]] = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        rf"{_ASK}(?:把|将)\s*(?P<text>.+?)\s*(?:翻译|翻譯|译|译|翻)(?:成|为|到|至)\s*(?:{NAMES}){_END}",
        rf"{_ASK}(?P<text>.+?)[，,]?\s*(?:用|的)?\s*(?:{NAMES})\s*{_SAY}{_END}",
        rf"{_ASK}(?:用)?(?:{NAMES})\s*(?:怎么说|怎么讲)[:：\s]*(?P<text>.+?){_END}",
        rf"{_ASK}(?:翻译|翻譯|译)(?:一下|下)?(?:(?:成|为|到|至)\s*(?:{NAMES}))?[:：，,\s]*(?P<text>.+)\Z",
        rf"{_ASK}(?P<text>.+?)[，,。\s]+(?:请)?(?:帮我)?(?:翻译|翻譯|译)(?:成|为|到|至)\s*(?:{NAMES}){_END}",
        rf"{_ASK}translate\s+(?:the following\s+)?(?:{FROM}\s*)?{TO}\s*[:,]?\s+(?P<text>.+)\Z",
        rf"{_ASK}translate\s+(?:the following\s+)?(?P<text>.+?)\s+(?:{FROM}\s*)?{TO}(?:\s*{FROM})?{_END}",
        rf"\A(?:how (?:do|would|can|to)\s*(?:you|i|we|one)?\s*say|what(?:'s| is))\s+(?P<text>.+?)\s+{TO}{_END}",
        rf"{_ASK}translate\s+(?P<text>.+)\Z",
    )
)
_QUOTES: Final = "“”「」『』\"'`《》"


def split_translation(text: str) -> Request:
    """The instruction and the text to translate; the text is empty where the message only points at one."""
    request = split_request(text, VERBS)
    if not request.payload and request.instruction and len(request.instruction) <= LINE_MAX:
        for pattern in _INLINE:
            if found := pattern.search(request.instruction):
                payload = found.group("text")
                around = f"{request.instruction[: found.start('text')]} {request.instruction[found.end('text') :]}"
                request = Request(around.strip(), payload)
                break
    payload = _unquote(request.payload)
    return Request(request.instruction, "" if is_bare(payload, PLAIN) and request.instruction else payload)


def extra_wish(instruction: str) -> str:
    """The instruction where it says more than "translate this into French", else an empty text."""
    return "" if is_bare(instruction, PLAIN) else instruction.rstrip(":： ")


def _unquote(text: str) -> str:
    text = text.strip()
    return (
        text[1:-1].strip()
        if len(text) > 2 and text[0] in _QUOTES and text[-1] in _QUOTES and "\n" not in text
        else text
    )
