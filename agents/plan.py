"""The words of a message that ask for each step of a plan, by the verbs of its clauses.

Which steps there are is for `agents.reader` to say, or for the user; here a clause that names a task's own verb is
found for each of them.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from agents.instruction import Instruction
from onebox.events import Step

FIRST_VERB_WITHIN: Final = 60
VERB_WITHIN: Final = 14
FLAGS: Final = re.IGNORECASE


def _read(path: Path) -> dict[str, str]:
    alternatives: dict[str, list[str]] = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: "|".join(words) for name, words in alternatives.items()}


_PATTERNS: Final = _read(Path(__file__).parent / "data" / "steps.toml")
_JOINT: Final = re.compile(
    rf"(?:[,;.，。；、!！]\s*)?(?:{_PATTERNS['then']}|{_PATTERNS['also']})\s*|[,;，；。.!！]\s*|\n\s*|[:：]\s*",
    FLAGS,
)
_TASKS: Final = {
    name: re.compile(_PATTERNS[name], FLAGS) for name in ("translate", "summarize", "write", "reason", "qa")
}
_NO_STEP: Final = re.compile(_PATTERNS["no_step"], FLAGS)


@dataclass(frozen=True, slots=True)
class _Clause:
    """A part of the message with a task's verb."""

    task: str
    start: int
    end: int


def describe(instruction: Instruction, message: str, plan: Sequence[str]) -> tuple[Step, ...]:
    """The steps of a given plan, with the words of `message` that ask for each where there are such."""
    if len(plan) < 2:
        return ()
    known = _joined(_clauses(instruction, plan))
    steps: list[Step] = []
    for index, task in enumerate(plan):
        clause = next((one for one in known if one.task == task), None)
        if clause is None:
            steps.append(Step(task, "previous" if index else "message"))
            continue
        known.remove(clause)
        steps.append(_as_step(clause, message, index))
    return tuple(steps)


def words_between(message: str, start: int, end: int) -> str:
    """The words of a part of a message, without what joins it to its neighbours."""
    return message[start:end].strip(" \n\t,;.:，。；：、")


def _clauses(instruction: Instruction, tasks: Sequence[str]) -> list[_Clause]:
    """The clauses that name a task; one that names none belongs to the clause before it, but not what a colon begins:
    that is the text that the steps work on.
    """
    found: list[_Clause] = []
    for segment in instruction.segments:
        joints = [
            (0, 0),
            *((m.start(), m.end()) for m in _JOINT.finditer(segment.text) if m.end()),
            (len(segment.text),) * 2,
        ]
        for (joint, begin), (end, _) in pairwise(joints):
            text = segment.text[begin:end]
            task = _task(text, first=not found)
            if task is not None and task in tasks:
                found.append(_Clause(task, segment.start + joint, segment.start + end))
            elif segment.text[joint:begin].strip() in {":", "："}:
                break
            elif found and text.strip() and found[-1].end == segment.start + joint:
                found[-1] = replace(found[-1], end=segment.start + end)
    return found


def _joined(clauses: Sequence[_Clause]) -> list[_Clause]:
    """Neighbours of one task as one clause."""
    joined: list[_Clause] = []
    for clause in clauses:
        if joined and joined[-1].task == clause.task:
            joined[-1] = replace(joined[-1], end=clause.end)
        else:
            joined.append(clause)
    return joined


def _as_step(clause: _Clause, message: str, index: int) -> Step:
    words = words_between(message, clause.start, clause.end)
    return Step(clause.task, "previous" if index else "message", words, clause.start, clause.end)


def _task(clause: str, *, first: bool) -> str | None:
    cleaned = _NO_STEP.sub(lambda match: " " * len(match.group()), clause)
    found = [
        (match.start(), task) for task, pattern in _TASKS.items() if (match := pattern.search(cleaned)) is not None
    ]
    if not found:
        return None
    start, task = min(found, key=lambda pair: pair[0])
    # A verb deep inside a clause is somebody else's: "the man who asked me to translate".
    return task if start <= (FIRST_VERB_WITHIN if first else VERB_WITHIN) else None
