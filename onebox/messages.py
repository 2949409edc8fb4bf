"""Messages: the unit of a conversation.

Pure values. Identity, storage and wire shape live elsewhere (`agents.conversations`, `agents.api`).
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One role's text."""

    role: Role
    text: str


def user(text: str) -> Message:
    """A message from the person."""
    return Message("user", text)


def assistant(text: str) -> Message:
    """A message from the box."""
    return Message("assistant", text)


def system(text: str) -> Message:
    """An instruction to the model that no user sees."""
    return Message("system", text)
