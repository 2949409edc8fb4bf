"""The labelled messages in `agents/data`, as lines of JSON; the labelling rules are in its README.md."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onebox.messages import Message

DATA: Final = Path(__file__).parent / "data"
TRAINING: Final = ("zh.jsonl", "en.jsonl", "other.jsonl", "plain.jsonl", "edges.jsonl", "plans.jsonl")
GOLDEN: Final = DATA / "golden.jsonl"
GOLDEN_PLANS: Final = DATA / "golden_plans.jsonl"
HELD_OUT: Final = DATA / "held_out.jsonl"
BOUNDARY: Final = DATA / "boundary.jsonl"
HABITS: Final = DATA / "habits.jsonl"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A conversation whose last message was labelled by hand.

    `plan` has its steps in order; `unsupported` says whether it asks for what cannot be done here (None: not said).
    """

    id: str
    messages: tuple[Message, ...]
    plan: tuple[str, ...]
    lang: str
    hard: bool = False
    unsupported: bool | None = None

    @property
    def task(self) -> str:
        """The first step."""
        return self.plan[0]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file. Raises `ValueError` with the number of a line that is no JSON object."""
    found = []
    # Not by `splitlines`: JSON may have the other line ends of Unicode inside its strings.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not a JSON object")
            found.append(record)
    return found


def read_labelled(paths: Sequence[Path]) -> list[Labelled]:
    """The labelled messages in `paths`, in order."""
    found = []
    for path in paths:
        for record in read_records(path):
            plan = tuple(record.get("plan") or [record["task"]])
            unsupported = record.get("unsupported", None if plan[0] == "chat" else False)
            messages = tuple(Message(one["role"], one["content"]) for one in record["messages"])
            hard = bool(record.get("hard", False))
            found.append(Labelled(record["id"], messages, plan, record["lang"], hard, unsupported))
    return found


def training_data() -> list[Labelled]:
    """All labelled messages that the shipped weights are trained on."""
    return read_labelled([DATA / name for name in TRAINING])
