"""Slash commands: `/translate …`, `/翻译 …`. Anything that merely looks like a path stays a message."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from onebox.records import TaskInfo

_COMMAND = re.compile(r"^/([^\s/]{1,40})(?:\s+(.*))?$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Command:
    """A known task and the text after its name."""

    task: str
    text: str


@dataclass(frozen=True, slots=True)
class UnknownCommand:
    """A slash word that is no task."""

    name: str


def parse_command(message: str, tasks: Sequence[TaskInfo]) -> Command | UnknownCommand | None:
    """The command in `message`, or None where it is an ordinary message.

    A task answers to its name and its titles in every language.
    """
    match = _COMMAND.match(message.strip())
    if match is None:
        return None
    word = match[1].casefold()
    for task in tasks:
        if word in {task.name.casefold(), *(title.casefold() for title in task.title.values())}:
            return Command(task.name, (match[2] or "").strip())
    return UnknownCommand(match[1])
