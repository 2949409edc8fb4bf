"""Words that ask for something, in the languages the router knows: they find the instruction in a message, no more.

The words are in `agents/data/cues.toml`.
"""

import re
import tomllib
from pathlib import Path
from typing import Final


def _read(path: Path) -> dict[str, str]:
    alternatives: dict[str, list[str]] = tomllib.loads(path.read_text(encoding="utf-8"))
    language = f"(?:{'|'.join(alternatives['language'])})"
    return {name: "|".join(words).replace("{language}", language) for name, words in alternatives.items()}


_PATTERNS: Final = _read(Path(__file__).parent / "data" / "cues.toml")
_ASKING: Final = ("translate_verb", "summarize", "write", "reason", "explain")
_ORDERING: Final = ("translate_verb", "summarize", "write")

ANY_TASK: Final = re.compile("|".join(_PATTERNS[name] for name in _ASKING) + r"|[?？؟]\s*$")
ORDER: Final = re.compile("|".join(_PATTERNS[name] for name in _ORDERING) + r"|[?？؟]\s*$")
