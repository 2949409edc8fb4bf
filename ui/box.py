"""What passes between the page's events: what the browser tells, what the API said, how an exchange ended."""

from dataclasses import dataclass

from pydantic import BaseModel

from onebox.records import ConversationSummary, Readiness, TaskInfo
from ui.reply import Update


class Boot(BaseModel):
    """What the browser tells at load."""

    c: str | None = None
    lang: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an exchange ended. `restore` belongs back into the box; `notice` tells why nothing was sent. `left`: the
    session looks at something else by now."""

    update: Update | None = None
    restore: str = ""
    notice: str = ""
    left: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """What the API said about itself at the last load."""

    tasks: tuple[TaskInfo, ...]
    rows: tuple[ConversationSummary, ...]
    readiness: Readiness
