"""What of a conversation is read: at most `LENGTH` pieces, chosen so that the request is among them.

A short message is read whole. Of a long one the last and the first words, then its instruction (`agents.instruction`),
gaps marked; of an earlier message of the user its first and last words.
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
LENGTH: Final = 44
EARLIER: Final = 11
SHORT: Final = 5
WHOLE: Final = 200  # characters of a text that is split whole
NEAR: Final = 80  # characters of a longer one's beginning and end that are split
PART: Final = 14  # pieces of a long text's beginning and end that are read before the rest
LINE: Final = 22  # a first or last line as short as this is read whole
GAPS: Final = 3


@dataclass(frozen=True, slots=True)
class Encoded:
    """Pieces as the reader takes them. `spans`: a row of start and end in the last message each, -1 for others."""

    ids: NDArray[np.int64]
    spans: NDArray[np.int64]
    instruction: Instruction


def encode(pieces: Pieces, messages: Sequence[Message]) -> Encoded:
    """The last message of `messages`, a user's, with what the user said before."""
    text = messages[-1].text
    instruction = split_instruction(text)
    before = _earlier(pieces, [message.text for message in messages[:-1] if message.role == "user"][-2:])
    own = _own(pieces, text, instruction, LENGTH - 2 - len(before))
    ids = [START, *(piece.id for piece in own), END, *before]
    spans = [(-1, -1), *((piece.start, piece.end) for piece in own), *[(-1, -1)] * (len(before) + 1)]
    return Encoded(np.asarray(ids, np.int64), np.asarray(spans, np.int64).reshape(-1, 2), instruction)


def _earlier(pieces: Pieces, texts: Sequence[str]) -> list[int]:
    """What the user asked before; where that is only a few words, what was asked before them too."""
    if not texts:
        return []
    last = _ends([piece.id for piece in pieces.split(texts[-1][:NEAR])], EARLIER - 2)
    found = [END, *last, END]
    room = EARLIER - len(found) - 1
    if len(texts) > 1 and len(last) <= SHORT and room > 1:
        found += [*_ends([piece.id for piece in pieces.split(texts[0][:NEAR])], room), END]
    return found


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
    ends = [index for index, piece in enumerate(found) if piece.id == LINE_END]
    head = _part(ends[0] if ends else size)
    tail = _part(size - 1 - ends[-1] if ends else size)
    asked = [
        index
        for index, piece in enumerate(found)
        if any(piece.start < segment.end and piece.end > segment.start for segment in instruction.segments)
    ]
    wanted = [*range(max(size - tail, 0), size), *range(min(head, size)), *asked, *range(size)]
    return _in_order(found, wanted, room)


def _part(line: int) -> int:
    """How much of a beginning or an end is read first: a short line whole."""
    return line if 0 < line <= LINE else PART


def _in_order(found: list[Piece], wanted: Sequence[int], room: int) -> list[Piece]:
    """The first of the wanted pieces for which there is room, in the order of the text, gaps marked."""
    kept: set[int] = set()
    for index in wanted:
        if len(kept) >= room - GAPS:
            break
        kept.add(index)
    chosen: list[Piece] = []
    for index in sorted(kept):
        left_out = index - 1 not in kept or found[index].start - found[index - 1].end > 1
        if chosen and left_out and len(chosen) + 1 < room:
            chosen.append(Piece(END, found[index].start, found[index].start))
        chosen.append(found[index])
    return chosen[:room]


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
