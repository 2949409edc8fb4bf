"""Words that ask for something, in the languages the router knows: they find the instruction in a message, no more.

The words are in `agents/data/cues.toml`.
"""

import re
import tomllib
from pathlib import Path
from typing import Final

_WORD: Final = r"\b"


_PATTERNS: Final[dict[str, list[str]]] = tomllib.loads(
    (Path(__file__).parent / "data" / "cues.toml").read_text(encoding="utf-8")
)
_ASKING: Final = ("translate_verb", "summarize", "write", "reason", "explain")
_ORDERING: Final = ("translate_verb", "summarize", "write")


def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern for all; what begins with a word is tried where a word begins, and nowhere else."""
    found = [word for name in names for word in _PATTERNS[name]]
    words = "|".join(word.removeprefix(_WORD) for word in found if word.startswith(_WORD))
    others = "|".join(word for word in found if not word.startswith(_WORD))
    return re.compile(rf"{_WORD}(?:{words})|{others}|[?？؟]\s*$")


ANY_TASK: Final = _any_of(_ASKING)
ORDER: Final = _any_of(_ORDERING)
