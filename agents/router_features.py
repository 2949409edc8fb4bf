"""A conversation's last message as numbers: hashed n-grams, sentence embedding, cue words, shape.

Computed the same way in training and at run time. The instruction is found by `agents.instruction`; weights are
`agents.router_head`'s.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from agents.instruction import Instruction, Segment, script, split_instruction, width
from agents.router_cues import CUES
from onebox.messages import Message

BUCKETS: Final = 1 << 15
TASKS: Final = ("summarize", "translate", "qa", "reason", "write", "chat")
EMBEDDED_CHARS: Final = 180
NGRAM_SCALE: Final = 4.5
EMBEDDING_SCALE: Final = 4.0
CUE_SCALE: Final = 1.2
FOLLOW_UP_SCALE: Final = 1.5
FOLLOW_UP_KINDS: Final = (
    "any", "short", "medium", "shorter", "again", "language", "greeting", "question", "named", "long_reply",
)  # fmt: skip

_TOKEN: Final = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff]+|[\uac00-\ud7af]+|\d+|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[?？؟!！▁:：%=]"
)
_RUN: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_NUMBER: Final = re.compile(r"\d+(?:[.,]\d+)*|[一二三四五六七八九十百千]+(?=[个只天米元块岁人年月])")
_QUESTION_END: Final = re.compile(r"[?？؟吗呢]\s*$")
_MAIN_CUES: Final = (
    "translate_verb",
    "say_in",
    "summarize",
    "write",
    "explain",
    "reason",
    "question_word",
    "language",
    "live_or_device",
    "about_box",
)
_PAIRS: Final = tuple(combinations(_MAIN_CUES, 2))
_ORDERED: Final = ("translate_verb", "summarize", "write", "explain", "reason", "question_word", "live_or_device")


@dataclass(frozen=True, slots=True)
class Gram:
    """One n-gram: its bucket, its sign, and the span of the message it covers."""

    bucket: int
    sign: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Features:
    """What the head sees. `dense` has everything but the n-grams and the part for earlier turns."""

    grams: tuple[Gram, ...]
    value: float
    dense: NDArray[np.float32]


def embedded_text(instruction: Instruction) -> str:
    """The part of a message that is embedded."""
    text = instruction.text
    if len(text) <= EMBEDDED_CHARS:
        return text or "."
    return text[: EMBEDDED_CHARS * 2 // 3] + " " + text[-EMBEDDED_CHARS // 3 :]


def extract(messages: Sequence[Message], instruction: Instruction, embedding: NDArray[np.float32]) -> Features:
    """The features of the last message of `messages`, whose `instruction` and its `embedding` are given."""
    grams = tuple(gram for index, segment in enumerate(instruction.segments) for gram in _grams(segment, index))
    dense = np.concatenate(
        [embedding * EMBEDDING_SCALE, np.asarray(_shape(messages, instruction), dtype=np.float32) * CUE_SCALE]
    ).astype(np.float32)
    return Features(grams, NGRAM_SCALE / max(len(grams), 12) ** 0.5, dense)


def follow_up(
    previous: NDArray[np.float32] | None, messages: Sequence[Message], instruction: Instruction
) -> NDArray[np.float32]:
    """What the earlier turns add: the task probabilities of the turn before, by the kind of message that follows."""
    kinds = np.zeros(len(FOLLOW_UP_KINDS), dtype=np.float32)
    if previous is None:
        return np.zeros(len(FOLLOW_UP_KINDS) * len(TASKS), dtype=np.float32)
    text = instruction.text
    hits = {
        name: CUES[name].search(text) is not None
        for name in ("shorter", "again", "language", "greeting", "question_word")
    }
    size = width(messages[-1].text)
    named = any(CUES[name].search(text) for name in ("summarize", "translate_verb", "write"))
    told = next((len(m.text) for m in reversed(messages[:-1]) if m.role == "assistant"), 0)
    values = {
        "any": 1.0,
        "short": size <= 30 and not named,
        "medium": size <= 70 and not named,
        "shorter": hits["shorter"],
        "again": hits["again"],
        "language": hits["language"] and size <= 40,
        "greeting": hits["greeting"],
        "question": hits["question_word"] or _QUESTION_END.search(text) is not None,
        "named": named,
        "long_reply": told > 80,
    }
    kinds[:] = [float(values[name]) for name in FOLLOW_UP_KINDS]
    result: NDArray[np.float32] = (np.outer(kinds, previous).ravel() * FOLLOW_UP_SCALE).astype(np.float32)
    return result


def instructions(messages: Sequence[Message]) -> list[Instruction]:
    """The instruction of each of the last three user messages, oldest first."""
    return [split_instruction(message.text) for message in messages if message.role == "user"][-3:]


def _grams(segment: Segment, index: int) -> list[Gram]:
    found: list[Gram] = []
    words: list[tuple[str, int, int]] = []
    for match in _TOKEN.finditer(segment.text):
        token, start = match.group(), segment.start + match.start()
        if token.isdigit():
            token = "0" * min(len(token), 3)
        words.append((token, start, start + len(match.group())))
        if _RUN.match(token):
            for size in (1, 2, 3, 4):
                found += [
                    _gram("c", token[i : i + size], start + i, start + i + size) for i in range(len(token) - size + 1)
                ]
        elif len(token) > 3:
            padded = f"<{token}>"
            for size in (3, 4, 5):
                for i in range(len(padded) - size + 1):
                    left = start + max(i - 1, 0)
                    found.append(_gram("s", padded[i : i + size], left, min(left + size, start + len(token))))
    for token, start, end in words:
        found.append(_gram("w", token, start, end))
    for (a, start, _), (b, _, end) in pairwise(words):
        found.append(_gram("b", f"{a[-3:] if _RUN.match(a) else a} {b[:3] if _RUN.match(b) else b}", start, end))
    if words:
        first, last = words[0], words[-1]
        kind = "h" if index == 0 else "m"
        for size in (1, 2, 4):
            piece = first[0][:size] if _RUN.match(first[0]) else " ".join(word for word, _, _ in words[: size // 2 + 1])
            found.append(_gram(kind, piece, first[1], first[2]))
            tail = (
                last[0][-size:] if _RUN.match(last[0]) else " ".join(word for word, _, _ in words[-(size // 2 + 1) :])
            )
            found.append(_gram("e", tail, last[1], last[2]))
    return found


def _gram(kind: str, text: str, start: int, end: int) -> Gram:
    code = crc32(f"{kind}{text}".encode())
    return Gram(code & (BUCKETS - 1), 1.0 if code & 0x80000000 else -1.0, start, end)


def _shape(messages: Sequence[Message], instruction: Instruction) -> list[float]:
    text = instruction.text
    hits = {name: 1.0 if pattern.search(text) else 0.0 for name, pattern in CUES.items()}
    if hits["translate_noun"] and not CUES["translate_verb"].search(CUES["translate_noun"].sub(" ", text)):
        hits["translate_verb"] = 0.0
    payload = instruction.payload
    has_payload = 1.0 if width(payload) > 40 else 0.0
    has_quote = 1.0 if instruction.quotes else 0.0
    earlier = 1.0 if any(message.role == "assistant" for message in messages[:-1]) else 0.0
    other_script = 1.0 if payload and script(payload) not in {script(text), "none"} else 0.0
    question = 1.0 if any(_QUESTION_END.search(segment.text) for segment in instruction.segments) else 0.0
    numbers = len(_NUMBER.findall(text))
    all_numbers = numbers + len(_NUMBER.findall(payload))
    size = width(text)
    shape = [
        has_payload,
        has_quote,
        earlier,
        other_script,
        question,
        question * has_payload,
        min(numbers, 4) / 2,
        1.0 if numbers >= 2 else 0.0,
        min(all_numbers, 6) / 3,
        1.0 if size <= 14 else 0.0,
        1.0 if size <= 30 else 0.0,
        1.0 if size > 120 else 0.0,
        earlier * (1.0 if size <= 30 else 0.0),
        min(width(payload), 1200) / 400,
        question * hits["question_word"],
        question * min(numbers, 3) / 2,
    ]
    cues = list(hits.values())
    with_text = [value * max(has_payload, has_quote, earlier) for value in cues]
    pairs = [hits[a] * hits[b] for a, b in _PAIRS]
    return [*shape, *cues, *with_text, *pairs, *_order(text, hits)]


def _order(text: str, hits: dict[str, float]) -> list[float]:
    """Which task's words come first in the instruction, and which last."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for name in _ORDERED:
        if hits[name]:
            found = [match.start() for match in CUES[name].finditer(text)]
            starts[name], ends[name] = found[0], found[-1]
    first = min(starts, key=lambda name: starts[name], default=None)
    last = max(ends, key=lambda name: ends[name], default=None)
    return [float(name == first) for name in _ORDERED] + [float(name == last) for name in _ORDERED]
