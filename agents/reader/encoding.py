"""What of a conversation is read: at most `LENGTH` pieces, chosen so that the request is among them.

A short message is read whole. Of a long one the last and the first words, then its instruction (`agents.instruction`),
gaps marked; of an earlier message of the user the beginning, and the last words of a longer one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.instruction import Instruction, split_instruction
from agents.reader.pieces import LINE_END, Piece, Pieces
from onebox.messages import Message

START: Final = 0
END: Final = 2  # also stands where something was left out
LENGTH: Final = 46
EARLIER: Final = 11
SHORT: Final = 5
WHOLE: Final = 200  # characters of a text that is split whole
NEAR: Final = 80  # characters of a longer one's beginning and end that are split
PART: Final = 13  # pieces of a long text's beginning or end that are read before the rest
QUIET: Final = 8  # so many of one where no instruction was found
LINE: Final = 20  # a first or last line as short as this is read whole, where it asks for something
GAPS: Final = 3


@dataclass(frozen=True, slots=True)
class Encoded:
    """Pieces as the reader takes them. `spans`: a row of start and end in the last message each, -1 for others.

    The mark of a gap has a span of no width.
    """

    ids: NDArray[np.int64]
    spans: NDArray[np.int64]
    instruction: Instruction


def encode(pieces: Pieces, messages: Sequence[Message], length: int = LENGTH) -> Encoded:
    """The last message of `messages`, a user's, with what the user said before, in at most `length` pieces."""
    text = messages[-1].text
    instruction = split_instruction(text)
    said = [message.text.strip() for message in messages[:-1] if message.role == "user"]
    before = _earlier(pieces, [one for one in said if one][-2:])
    own = _own(pieces, text, instruction, length - 2 - len(before))
    ids = [START, *(piece.id for piece in own), END, *before]
    spans = [(-1, -1), *((piece.start, piece.end) for piece in own), *[(-1, -1)] * (len(before) + 1)]
    return Encoded(np.asarray(ids, np.int64), np.asarray(spans, np.int64).reshape(-1, 2), instruction)


def _earlier(pieces: Pieces, texts: Sequence[str]) -> list[int]:
    """What the user asked before; where that is only a few words, what was asked before them too."""
    if not texts:
        return []
    last = _ends(_ids(pieces, texts[-1]), EARLIER - 2)
    found = [END, *last, END]
    room = EARLIER - len(found) - 1
    if len(texts) > 1 and len(last) <= SHORT and room > 1:
        found += [*_ends(_ids(pieces, texts[0]), room), END]
    return found


def _ids(pieces: Pieces, text: str) -> list[int]:
    """The pieces of a text's beginning, and of its end if that is further on."""
    parts = [text[:NEAR], text[max(NEAR, len(text) - NEAR) :]]
    return [piece.id for part in parts for piece in pieces.split(part)]


def _ends(ids: list[int], room: int) -> list[int]:
    if len(ids) <= room:
        return ids
    tail = room // 3
    return [*ids[: room - tail], *ids[len(ids) - tail :]]


def _own(pieces: Pieces, text: str, instruction: Instruction, room: int) -> list[Piece]:
    found = _split(pieces, text, instruction)
    if len(found) <= room and len(text) <= WHOLE:
        return found
    size = len(found)
    ends = [index for index, piece in enumerate(found) if _breaks(piece, text) and 0 < index < size - 1]
    asked = [
        index
        for index, piece in enumerate(found)
        if any(piece.start < segment.end and piece.end > segment.start for segment in instruction.segments)
    ]
    head = _part(ends[0] if ends else size, bool(asked) and asked[0] < PART)
    tail = _part(size - 1 - ends[-1] if ends else size, bool(asked) and asked[-1] >= size - PART)
    wanted = [*range(max(size - tail, 0), size), *range(min(head, size)), *asked, *range(size)]
    return _in_order(found, text, wanted, room)


def _breaks(piece: Piece, text: str) -> bool:
    return piece.id == LINE_END and text[piece.start : piece.end] == "\n"


def _part(line: int, asks: bool) -> int:
    """How much of a beginning or an end is read first: where it asks for something, a short line whole."""
    if not asks:
        return QUIET
    return line if 0 < line <= LINE else PART


def _in_order(found: list[Piece], text: str, wanted: Sequence[int], room: int) -> list[Piece]:
    """The first of the wanted pieces for which there is room, in the order of the text, `GAPS` gaps marked."""
    kept: set[int] = set()
    for index in wanted:
        if len(kept) >= room - GAPS:
            break
        kept.add(index)
    chosen: list[Piece] = []
    gaps = 0
    for index in sorted(kept):
        left_out = index - 1 not in kept or text[found[index - 1].end : found[index].start].strip() != ""
        if chosen and left_out and gaps < GAPS:
            chosen.append(Piece(END, found[index].start, found[index].start))
            gaps += 1
        chosen.append(found[index])
    return chosen


def _split(pieces: Pieces, text: str, instruction: Instruction) -> list[Piece]:
    if len(text) <= WHOLE:
        return pieces.split(text)
    spans = [(0, NEAR), (len(text) - NEAR, len(text))]
    spans += [(segment.start, segment.end) for segment in instruction.segments]
    found: list[Piece] = []
    done = 0
    for start, end in sorted(spans):
        if max(start, done) < end:
            found += pieces.split(text[max(start, done) : end], max(start, done))
            done = end
    return found
