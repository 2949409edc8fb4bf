"""A simulated prefix cache: which blocks of a prompt the scripted engine would not have to compute again.

It works as vLLM's does: full blocks of tokens, each known by itself and all before it, the one unused longest
forgotten first. It holds no values; hits and queries are counted in tokens.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

BLOCK_TOKENS: Final = 16


class PrefixCache:
    """Room for `tokens` tokens; 0: it keeps nothing."""

    def __init__(self, tokens: int) -> None:
        self._room = tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.queried = 0
        self.hits = 0

    @property
    def tokens(self) -> int:
        """How many tokens it holds at most."""
        return self._room * BLOCK_TOKENS

    def look_up(self, pieces: Sequence[str], salt: str | None) -> int:
        """How many of the prompt's first tokens are here. Its last token is always computed, as in vLLM."""
        if not self._room:
            return 0
        found = 0
        for block in _chain(pieces[:-1], salt):
            if block not in self._blocks:
                break
            self._blocks.move_to_end(block)
            found += BLOCK_TOKENS
        self.queried += len(pieces)
        self.hits += found
        return found

    def keep(self, pieces: Sequence[str], salt: str | None) -> None:
        """Remember every full block of these tokens."""
        if not self._room:
            return
        for block in _chain(pieces, salt):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._room:
            self._blocks.popitem(last=False)


def _chain(pieces: Sequence[str], salt: str | None) -> Iterator[int]:
    before = hash(salt)
    for start in range(0, len(pieces) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        before = hash((before, *pieces[start : start + BLOCK_TOKENS]))
        yield before
