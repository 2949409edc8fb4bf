"""Plans: messages that ask for two or three things in a row, by rule.

A clause becomes a step only when it names a task's own verb after a word of sequence, so that "translate and keep
the tone" stays one step. An output language alone ("summarise in French") is never a step.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from agents.instruction import Instruction

STEPS_MAX: Final = 3


def _read(path: Path) -> dict[str, str]:
    alternatives: dict[str, list[str]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: "|".join(words) for name, words in alternatives.items()}


_PATTERNS: Final = _read(Path(__file__).parent / "data" / "steps.toml")
_JOINT: Final = re.compile(rf"\s*(?:[,;.，。；、]\s*)?(?:{_PATTERNS['sequence']})\s*|[,;，；。.\n]\s*", re.IGNORECASE)
_STEPS: Final = {
    task: re.compile(_PATTERNS[task], re.IGNORECASE) for task in ("translate", "summarize", "write", "reason", "qa")
}
_NOUN_USE: Final = re.compile(_PATTERNS["noun_use"], re.IGNORECASE)
_BACKWARD: Final = re.compile(r"\b(?:after|once) (?:you(?:'ve| have)? )?(?:translat|summari[sz])\w*\b[^,]*,")


def find_plan(instruction: Instruction, task: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """The steps the message asks for, in order of execution; one step, `task`, where it asks for one thing."""
    text = " \n".join(segment.text for segment in instruction.segments)
    if task == "chat" or _BACKWARD.search(text):
        return (task,)
    steps: list[str] = []
    for clause in _JOINT.split(text):
        step = _step(clause, first=not steps)
        if step is not None and step in tasks and (not steps or steps[-1] != step):
            steps.append(step)
    if not 2 <= len(steps) <= STEPS_MAX:
        return (task,)
    if steps[0] == "write" and set(steps) != {"write", "translate"}:
        # "Write a letter and explain why" is one letter; a text that was written can still be put into a language.
        return (task,)
    if steps[0] in {"qa", "reason"} and steps[1:] != ["translate"]:
        return (task,)
    return tuple(steps)


def _step(clause: str, *, first: bool) -> str | None:
    cleaned = _NOUN_USE.sub(" ", clause)
    found = [
        (match.start(), task) for task, pattern in _STEPS.items() if (match := pattern.search(cleaned)) is not None
    ]
    if not found:
        return None
    start, task = min(found, key=lambda pair: pair[0])
    # A verb deep inside a clause is somebody else's: "the man who asked me to translate".
    return task if start <= (60 if first else 14) else None
