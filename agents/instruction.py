"""The instruction of a message, told apart from the text it is about.

A pasted page drowns the sentence that says what to do with it, so the router looks at the instruction alone:
first and last clause, short lines that ask for something, quoted blocks left out. Offsets into the original
text are kept. What the instruction means is for `agents.reader` to say.
"""

import re
from dataclasses import dataclass
from typing import Final

from agents.router_cues import ANY_TASK, ORDER

HEAD_CHARS: Final = 160
TAIL_CHARS: Final = 120
SHORT_WIDTH: Final = 90
MIDDLE_LINES: Final = 2

# Traditional to Simplified for the characters instructions are made of; one to one, so offsets stay.
_TRADITIONAL: Final = str.maketrans(
    "請幫個為麼什這們來說話寫譯總結點個簡單長過會還時間問題對應該讓給從後裡裏幾麼嗎訂電腦網頁語種類數學計算題誰哪樣"
    "員統歷釋義讀關於張圖畫應擴縮潤飾標題詞詩評論紹議記錄報導檢錯雙兩價錢買賣減點鐘號鬧開燈樂聽視頻訊聯繫謝歡煩無聊"
    "較較與異優勢條項課經據內參見觀導體質麗愛戀寶貝務處備預約發送郵繪醫藥國際線車飛機場樓層氣溫熱陽東鳥魚龍龜級組織",
    "请帮个为么什这们来说话写译总结点个简单长过会还时间问题对应该让给从后里里几么吗订电脑网页语种类数学计算题谁哪样"
    "员统历释义读关于张图画应扩缩润饰标题词诗评论绍议记录报导检错双两价钱买卖减点钟号闹开灯乐听视频讯联系谢欢烦无聊"
    "较较与异优势条项课经据内参见观导体质丽爱恋宝贝务处备预约发送邮绘医药国际线车飞机场楼层气温热阳东鸟鱼龙龟级组织",
)

_QUOTED: Final = re.compile(
    # None of them goes past another one's beginning: thousands that never end would each be followed to the text's end.
    r"```.*?```|“[^“”]{2,}”|「[^「」]{2,}」|『[^『』]{2,}』|«[^«»]{2,}»|„[^„“”]{2,}[“”]|\"[^\"\n]{2,}\"|《[^《》]{2,}》"
    r"|(?:(?<=\s)|^)'[^'\n]{2,}'(?=\W|$)|(?<=\n)-{3,}\n.*?\n-{3,}",
    re.DOTALL,
)
_SENTENCE: Final = re.compile(r"[^。！？!?；;\n.：:]*(?:[。！？!?；;：:]+|\.(?=\s|$)|\.|\n|$)")
_COLON: Final = re.compile(r"[:：]\s*")
_KANA: Final = re.compile(r"[\u3040-\u30ff]")
_WIDE: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the instruction: its normalised text and where it starts in the message."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """Where it ends in the message."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a message asks for."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The segments as one line."""
        return " ".join(segment.text for segment in self.segments)


def normalize(text: str) -> str:
    """`text` in lower case and Simplified characters, of the same length."""
    lowered = text.lower()
    if len(lowered) != len(text):
        lowered = "".join(char.lower() if len(char.lower()) == 1 else char for char in text)
    # Japanese keeps characters that Chinese has simplified.
    return lowered if _KANA.search(lowered) else lowered.translate(_TRADITIONAL)


def width(text: str) -> int:
    """The room `text` takes: a Chinese, Japanese or Korean character counts as two and a half Latin ones."""
    return len(text) + len(_WIDE.findall(text)) * 3 // 2


def split_instruction(text: str) -> Instruction:
    """The instruction in `text`."""
    normal = normalize(text)
    open_text = _QUOTED.sub(_blank, normal)
    if not _has_words(open_text):
        open_text = normal
    if (
        width(open_text.strip()) <= SHORT_WIDTH * 2
        and open_text.strip().count("\n") == 0
        and not _colon_payload(open_text)
    ):
        return Instruction(_as_segments(open_text, 0, len(open_text)))
    spans = _instruction_spans(open_text)
    return Instruction(tuple(segment for start, end in spans for segment in _as_segments(open_text, start, end)))


def sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence of `text`, blank ones left out."""
    return [match.span() for match in _SENTENCE.finditer(text) if match.group().strip(" \n\t.。:：;；")]


def _blank(match: re.Match[str]) -> str:
    # A quote becomes blanks of its own length with a mark that stands for "something was quoted here".
    return " ▁" + " " * (len(match.group()) - 2)


def _has_words(text: str) -> bool:
    return len(re.sub(r"\W", "", text)) >= 2


def _colon_payload(text: str) -> bool:
    match = _COLON.search(text)
    return (
        match is not None and width(text[: match.start()]) <= SHORT_WIDTH and width(text[match.end() :].strip()) >= 24
    )


def _instruction_spans(text: str) -> list[tuple[int, int]]:
    lines = [(m.start(), m.end()) for m in re.finditer(r"[^\n]+", text) if m.group().strip().strip("-—─=*# \t")]
    if not lines:
        return [(0, len(text))]
    head = _head_span(text, *lines[0])
    tail = _tail_span(text, *lines[-1])
    middle = [
        span for span in lines[1:-1] if width(text[slice(*span)]) <= SHORT_WIDTH and ANY_TASK.search(text[slice(*span)])
    ]
    head_asks = _asks(text[slice(*head)]) or (len(lines) > 1 and width(text[slice(*lines[0])]) <= SHORT_WIDTH)
    # The last sentence of a pasted text is full of words that only look like a request.
    tail_asks = ORDER.search(text[slice(*tail)]) is not None or (
        len(lines) > 1 and width(text[slice(*lines[-1])]) <= SHORT_WIDTH // 2
    )
    spans = []
    if head_asks or not tail_asks:
        spans.append(head)
    spans += middle[:MIDDLE_LINES]
    if tail_asks or not head_asks:
        start = max(tail[0], spans[-1][1] if spans else 0)
        if start < tail[1]:
            spans.append((start, tail[1]))
    return spans


def _asks(piece: str) -> bool:
    return ANY_TASK.search(piece) is not None


def _head_span(text: str, start: int, end: int) -> tuple[int, int]:
    line = text[start:end]
    colon = _COLON.search(line)
    if colon is not None and width(line[: colon.start()]) <= SHORT_WIDTH * 2:
        rest = sentences(line[colon.end() :])[:1]
        stop = colon.end()
        if (
            rest
            and line[: stop + rest[0][1]].rstrip()[-1:] in "?？؟"
            and width(line[stop : stop + rest[0][1]]) <= SHORT_WIDTH * 2
        ):
            stop += rest[0][1]
        return start, start + stop
    if width(line) <= SHORT_WIDTH * 2:
        return start, end
    first = sentences(line)[:1]
    stop = first[0][1] if first else len(line)
    return start, start + min(stop, HEAD_CHARS)


def _tail_span(text: str, start: int, end: int) -> tuple[int, int]:
    line = text[start:end]
    if width(line) <= SHORT_WIDTH:
        return start, end
    found = sentences(line)
    begin = found[-1][0] if found else 0
    if len(found) > 1 and width(line[begin:]) <= 24 and not _asks(line[begin:]):
        begin = found[-2][0]
    return start + max(begin, len(line) - TAIL_CHARS), end


def _as_segments(text: str, start: int, end: int) -> tuple[Segment, ...]:
    piece = text[start:end]
    stripped = piece.strip()
    if not stripped:
        return ()
    offset = start + piece.index(stripped)
    if len(stripped) <= HEAD_CHARS + TAIL_CHARS:
        return (Segment(stripped, offset),)
    cut = len(stripped) - TAIL_CHARS
    return (Segment(stripped[:HEAD_CHARS], offset), Segment(stripped[cut:], offset + cut))
