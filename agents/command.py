"""A message that begins with `/task`: the user has chosen the task."""

import re
from collections.abc import Container
from typing import Final

_COMMAND: Final = re.compile(r"\s*/(\S+)(?:\s+|$)")


def split_command(text: str, tasks: Container[str]) -> tuple[str, str] | None:
    """The task that a message begins with, and the rest of the message; None where it begins with none of `tasks`."""
    found = _COMMAND.match(text)
    return (found[1], text[found.end() :].rstrip()) if found is not None and found[1] in tasks else None
