"""Cuts a text into what a translator may touch and what must stay as it is, byte for byte.

Code fences, blank lines, list marks, headings' signs and lines without a word are kept; inside a sentence, so are
URLs, placeholders and inline code, which `protected` lists.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_FENCE: Final = re.compile(r"[ \t]*(```+|~~~+)")
_MARK: Final = re.compile(
    r"[ \t]*(?:#{1,6}[ \t]+|[-*+•][ \t]+(?:\[[ xX]\][ \t]+)?|\d{1,3}[.)、][ \t]*|>[ \t]?|[（(]\d{1,3}[)）][ \t]*)"
)
_TABLE: Final = re.compile(r"[ \t]*\|.*\|[ \t]*")
_WORD: Final = re.compile(r"[^\W\d_]")
_PROTECTED: Final = re.compile(
    r"`[^`\n]+`"
    r"|https?://[^\s<>\"'，。；、）】]+"
    r"|[\w.+-]+@[\w-]+\.[\w.]+\w"
    r"|\{\{[^{}\n]+\}\}|\$\{[^{}\n]+\}|\{[\w.:]*\}|<[/\w][^<>\n]*>"
    r"|%\(\w+\)[sdf]|%[-\d.]*[sdif](?![a-z])"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the text; `kept` pieces are not for translation. Segments join to the text."""

    text: str
    kept: bool


def split_markup(text: str) -> list[Segment]:
    """The text's segments: prose paragraphs whole, marked lines one by one."""
    segments: list[Segment] = []
    for segment in _segments(text.splitlines(keepends=True)):
        if segments and segments[-1].kept and segment.kept:
            segments[-1] = Segment(segments[-1].text + segment.text, True)
        else:
            segments.append(segment)
    return segments


def protected(text: str) -> list[str]:
    """What must come through unchanged in a piece of prose, in order."""
    return [match.group() for match in _PROTECTED.finditer(text)]


def lost(source: str, translation: str) -> list[str]:
    """The protected pieces of `source` that `translation` has fewer times."""
    pieces = protected(source)
    return sorted({piece for piece in pieces if translation.count(piece) < pieces.count(piece)})


def split_protected(text: str) -> list[Segment]:
    """The prose between protected pieces, and those."""
    segments, end = [], 0
    for match in _PROTECTED.finditer(text):
        segments += _between(text[end : match.start()])
        segments.append(Segment(match.group(), True))
        end = match.end()
    return [*segments, *_between(text[end:])]


def _between(text: str) -> list[Segment]:
    return [part for part in _trim(text) if part.text]


def _segments(lines: list[str]) -> Iterator[Segment]:
    prose: list[str] = []
    fence = ""
    for line in lines:
        opening = _FENCE.match(line)
        if fence:
            yield Segment(line, True)
            if opening and opening.group(1).startswith(fence):
                fence = ""
            continue
        mark = _MARK.match(line)
        if opening or mark or _TABLE.fullmatch(line.rstrip("\n")) or not _translatable(line):
            yield from _trim("".join(prose))
            prose = []
        if opening:
            fence = opening.group(1)
            yield Segment(line, True)
        elif not _translatable(line):
            yield Segment(line, True)
        elif _TABLE.fullmatch(line.rstrip("\n")):
            for cell in re.split(r"(\|)", line):
                yield from _trim(cell)
        elif mark:
            yield Segment(mark.group(), True)
            yield from _trim(line[mark.end() :])
        else:
            prose.append(line)
    yield from _trim("".join(prose))


def _translatable(line: str) -> bool:
    return bool(_WORD.search(_PROTECTED.sub("", line)))


def _trim(text: str) -> Iterator[Segment]:
    """The text with the white space around it kept apart."""
    if not text:
        return
    if not _translatable(text):
        yield Segment(text, True)
        return
    core = text.strip()
    start = text.index(core)
    for piece, kept in ((text[:start], True), (core, False), (text[start + len(core) :], True)):
        if piece:
            yield Segment(piece, kept)
