"""Words that speak for a task, in the languages the router knows: hints to the head, never rules of their own.

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

CUES: Final[dict[str, re.Pattern[str]]] = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}
ANY_TASK: Final = re.compile("|".join(_PATTERNS[name] for name in _ASKING) + r"|[?？؟]\s*$")
ORDER: Final = re.compile("|".join(_PATTERNS[name] for name in _ORDERING) + r"|[?？؟]\s*$")
