"""Text to the pieces of a vocabulary, by the likeliest way to cut it (Kudo 2018, unigram language model).

The vocabulary is three sorted arrays (hash, number, log-probability: 4 MB), not a dictionary (77 MB): every substring's
hash is rolled along the text and looked up in one pass. What a piece covers is told as a span of the text as given.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.reader.source import Source

UNKNOWN: Final = 3
LINE_END: Final = 3  # a line's end is read as a piece of its own
LONGEST: Final = 16
SPACE: Final = "▁"
LINE: Final = "\n"
_BOUNDS: Final = (SPACE, LINE)  # a piece goes past none
# What composes with the character before it and is no combining mark: Korean vowels and finals, Japanese voice marks.
_JOINED: Final = re.compile("[\u1160-\u11ff\uff9e\uff9f]")
_PRIME: Final = np.uint64(0x9E3779B97F4A7C15)
_UNKNOWN_COST: Final = 10.0


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece: its number in the vocabulary, and the span of the text that it covers."""

    id: int
    start: int
    end: int


class Pieces:
    """A vocabulary that splits text."""

    def __init__(self, source: Source) -> None:
        letters, bounds, scores = source.vocabulary()
        starts = np.cumsum((np.frombuffer(letters, np.uint8) & 0xC0) != 0x80)
        edges = np.concatenate([[0], starts])[bounds].astype(np.int64)
        codes = np.frombuffer(letters.decode("utf-8").encode("utf-32-le"), np.uint32).astype(np.uint64)
        hashes = np.zeros(len(scores), np.uint64)
        sizes = np.diff(edges)
        for place in range(min(int(sizes.max()), LONGEST)):
            longer = sizes > place
            hashes[longer] = hashes[longer] * _PRIME + codes[edges[:-1][longer] + place]
        usable = np.flatnonzero((sizes > 0) & (sizes <= LONGEST) & (np.arange(len(scores)) > UNKNOWN))
        order = usable[np.argsort(hashes[usable], kind="stable")]
        self._hashes, self._ids, self._scores = hashes[order], order.astype(np.int32), scores[order]
        self._unknown = float(self._scores.min()) - _UNKNOWN_COST

    def split(self, text: str, offset: int = 0) -> list[Piece]:
        """The pieces of `text`; spans count from `offset`. Blanks are part of the word that follows."""
        normal, places = _normalize(text)
        words, where = _words(normal)
        found: list[Piece] = []
        for number, start, end in self._cut(words):
            left = start
            while left < end and where[left] < 0:
                left += 1
            # A mark alone stands where its word begins.
            first = offset + places[where[left]]
            last = offset + places[where[end - 1] + 1] if left < end else first
            found.append(Piece(number, first, last))
        return found

    def _cut(self, words: str) -> list[tuple[int, int, int]]:
        """The likeliest cut of `words`: number, start and end of each piece. None goes past a word's end."""
        size = len(words)
        codes = np.zeros(size + LONGEST, np.uint64)
        codes[:size] = np.frombuffer(words.encode("utf-32-le", "surrogatepass"), np.uint32)
        hashes = np.zeros((size, LONGEST), np.uint64)
        rolled = np.zeros(size, np.uint64)
        for place in range(LONGEST):
            rolled = rolled * _PRIME + codes[place : size + place]
            hashes[:, place] = rolled
        bounds = [index for index, char in enumerate(words) if char in _BOUNDS]
        ends = np.array([*bounds, size])[np.searchsorted(bounds, np.arange(size), side="right")]
        begins, lengths = np.nonzero(np.arange(1, LONGEST + 1) <= (ends - np.arange(size))[:, None])
        wanted = hashes[begins, lengths]
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        known = self._hashes[at] == wanted
        at, begins, lengths = at[known], begins[known], lengths[known]
        return self._cheapest(words, begins.tolist(), (lengths + 1).tolist(), self._ids[at], self._scores[at])

    def _cheapest(
        self, words: str, begins: list[int], spans: list[int], ids: NDArray[np.int32], scores: NDArray[np.float32]
    ) -> list[tuple[int, int, int]]:
        size = len(words)
        best = [-1e18] * (size + 1)
        back: list[tuple[int, int]] = [(UNKNOWN, 0)] * (size + 1)
        best[0] = 0.0
        numbers, weights = ids.tolist(), scores.tolist()
        index, count = 0, len(begins)
        for start in range(size):
            here, single = best[start], False
            while index < count and begins[index] == start:
                end, score = start + spans[index], here + weights[index]
                single = single or spans[index] == 1
                if score > best[end]:
                    best[end], back[end] = score, (numbers[index], start)
                index += 1
            if not single and here + self._unknown > best[start + 1]:
                best[start + 1], back[start + 1] = here + self._unknown, (UNKNOWN, start)
        cut: list[tuple[int, int, int]] = []
        end = size
        while end > 0:
            number, start = back[end]
            # What is unknown is one piece as long as it goes on, but for the ends of lines.
            if number == UNKNOWN and cut and cut[-1][0] == UNKNOWN and LINE not in (words[start], words[end]):
                cut[-1] = (UNKNOWN, start, cut[-1][2])
            else:
                cut.append((number, start, end))
            end = start
        return cut[::-1]


def _normalize(text: str) -> tuple[str, list[int]]:
    """`text` in normal form KC, and where in `text` each of its characters (and its end) comes from."""
    if text.isascii() or unicodedata.is_normalized("NFKC", text):
        return text, list(range(len(text) + 1))
    out: list[str] = []
    places: list[int] = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and (unicodedata.combining(text[end]) or _JOINED.match(text[end])):
            end += 1
        cluster = unicodedata.normalize("NFKC", text[start:end])
        out.append(cluster)
        places += [start] * len(cluster)
        start = end
    places.append(len(text))
    return "".join(out), places


def _words(text: str) -> tuple[str, list[int]]:
    """`text` with a mark before each word for the blanks there, and where each character comes from (a mark: -1).

    A line's end stays, once however many lines are empty.
    """
    out: list[str] = []
    where: list[int] = []
    blank = True
    for index, char in enumerate(text):
        if char.isspace():
            blank = True
            if char == LINE and (not out or out[-1] != LINE):
                out.append(LINE)
                where.append(index)
            continue
        if blank:
            out.append(SPACE)
            where.append(-1)
            blank = False
        out.append(char)
        where.append(index)
    return "".join(out), where
