"""Cuts long texts where their structure allows: between paragraphs, else lines, else sentences, else anywhere.

Chunks join to the text again, character for character.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from onebox.messages import user
from onebox.plugin import LLM

SAFETY: Final = 0.85
COUNTS_AT_ONCE: Final = 8
_PARAGRAPHS: Final = re.compile(r".+?(?:\n[ \t]*\n\s*|\Z)", re.DOTALL)
_LINES: Final = re.compile(r"[^\n]*\n|[^\n]+\Z")
_SENTENCES: Final = re.compile(r".+?(?:[。！？；…]+[”’」』）]*|[.!?;]+[\"')\]]*\s+|\n+|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a text and where it stands in it."""

    start: int
    text: str

    @property
    def end(self) -> int:
        """The offset after its last character."""
        return self.start + len(self.text)


def split_text(text: str, max_bytes: int) -> list[str]:
    """Chunks of at most `max_bytes` bytes of UTF-8, as few as the structure allows; they join to `text`."""
    return _pack(text, max_bytes, (_PARAGRAPHS, _LINES, _SENTENCES))


async def split_to_fit(llm: LLM, text: str, max_tokens: int) -> list[str]:
    """Chunks of at most `max_tokens` tokens by the engine's own count."""
    tokens = await llm.count_tokens([user(text)])
    if tokens <= max_tokens:
        return [text]
    per_byte = tokens / len(text.encode())
    chunks = split_text(text, max(64, int(max_tokens / per_byte * SAFETY)))
    gate = asyncio.Semaphore(COUNTS_AT_ONCE)

    async def recheck(chunk: str) -> list[str]:
        size = len(chunk.encode())
        if size + 32 <= max_tokens:
            return [chunk]
        async with gate:
            counted = await llm.count_tokens([user(chunk)])
        return (
            [chunk] if counted <= max_tokens else split_text(chunk, max(64, int(size * max_tokens / counted * SAFETY)))
        )

    async with asyncio.TaskGroup() as group:
        checks = [group.create_task(recheck(chunk)) for chunk in chunks]
    return [piece for check in checks for piece in check.result()]


def sentences(text: str) -> list[Span]:
    """The text's sentences, blank ones left out."""
    found = _SENTENCES.finditer(text)
    return [Span(match.start(), match.group()) for match in found if match.group().strip()]


def passages(text: str, max_bytes: int) -> list[Span]:
    """Chunks with their offsets, for retrieval."""
    spans, start = [], 0
    for chunk in split_text(text, max_bytes):
        if chunk.strip():
            spans.append(Span(start, chunk))
        start += len(chunk)
    return spans


def _pack(text: str, max_bytes: int, levels: Sequence[re.Pattern[str]]) -> list[str]:
    if len(text.encode()) <= max_bytes:
        return [text]
    if not levels:
        return _cut(text, max_bytes)
    chunks: list[str] = []
    current, size = "", 0
    for piece in levels[0].findall(text):
        bytes_ = len(piece.encode())
        if size + bytes_ <= max_bytes:
            current, size = current + piece, size + bytes_
            continue
        if current:
            chunks.append(current)
        current, size = piece, bytes_
        if bytes_ > max_bytes:
            *whole, current = _pack(piece, max_bytes, levels[1:])
            chunks.extend(whole)
            size = len(current.encode())
    return [*chunks, current] if current else chunks


def _cut(text: str, max_bytes: int) -> list[str]:
    """Pieces of a text without structure; a character is at most four bytes."""
    cuts, rest = [], text
    while len(rest.encode()) > max_bytes:
        head = rest.encode()[:max_bytes].decode(errors="ignore") or rest[0]
        space = head.rfind(" ")
        head = head[: space + 1] if space > len(head) // 2 else head
        cuts.append(head)
        rest = rest[len(head) :]
    return [*cuts, rest] if rest else cuts
