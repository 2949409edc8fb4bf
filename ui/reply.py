"""What the page shows of an exchange (`Update`), and a reply as it grows out of its run's events (`Growing`).

Values only: where the events come from is `ui.chat`, what an update looks like is `ui.render`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from onebox.errors import OneboxError, Unavailable, from_code
from onebox.events import (
    Accepted,
    Check,
    Completed,
    Event,
    Failed,
    Progress,
    Queued,
    Replanned,
    Routed,
    StepStarted,
    Stopped,
    TextDelta,
    Usage,
)
from onebox.plans import replan
from onebox.records import Conversation, Problem, Turn, Variant

PENDING = "pending"


@dataclass(frozen=True, slots=True)
class Update:
    """The page's new state. `conversation` None: leave what is shown. `waiting_s`: seconds spent on a model that
    is loading. `queued`: where the run waits for an engine. `unsent`: the message belongs back in the box. `step`: the
    one of the plan that is at work, from 0."""

    conversation: Conversation | None
    running: bool
    progress: Progress | None = None
    checks: tuple[Check, ...] = ()
    waiting_s: int | None = None
    problem: Problem | None = None
    unsent: bool = False
    cut: bool = False
    queued: Queued | None = None
    step: int = 0


@dataclass(slots=True)
class Growing:
    """One reply; its text is joined once per update."""

    variant: Variant = field(default_factory=lambda: Variant(PENDING, "", state="running"))
    pieces: list[str] = field(default_factory=list)
    progress: Progress | None = None
    checks: tuple[Check, ...] = ()
    cut: bool = False
    queued: Queued | None = None
    step: int = 0

    def take(self, events: Sequence[Event]) -> None:
        """Grow by these events, the next ones of the run."""
        for event in events:
            match event:
                case TextDelta(text=text):
                    self.pieces.append(text)
                    self.progress = self.queued = None
                case Accepted(run_id=run_id):
                    self.variant = replace(self.variant, run_id=run_id)
                case Routed():
                    self.variant = replace(self.variant, route=event, task=event.task)
                case Replanned():
                    if self.variant.route is not None:
                        self.variant = replace(self.variant, route=replan(self.variant.route, event))
                case StepStarted(index=index):
                    self.step = index
                case Queued(position=position):
                    self.queued = event if position else None
                case Progress():
                    self.progress = event
                case Check():
                    self.checks += (event,)
                case Usage():
                    self.variant = replace(self.variant, usage=event)
                case Completed(finish=finish):
                    self.variant = replace(self.variant, state="completed")
                    self.cut = finish == "length"
                case Stopped():
                    self.variant = replace(self.variant, state="stopped", receipt=event)
                case Failed(code=code, message=message):
                    self.variant = replace(self.variant, state="failed", error=Problem(code, message))
                case _:
                    pass
        self.variant = replace(self.variant, text="".join(self.pieces))

    def fail(self, error: OneboxError) -> None:
        """End here for a reason that is not in the run's log: it cannot be read."""
        self.variant = replace(self.variant, state="failed", error=Problem(error.code, error.message))

    @property
    def running(self) -> bool:
        """Whether there is more to come."""
        return self.variant.state == "running"

    def unavailable(self) -> Unavailable | None:
        """What was missing, where the reply failed before its first word because something was not there."""
        problem = self.variant.error
        if problem is None or self.pieces:
            return None
        error = from_code(problem.code, problem.message)
        return error if isinstance(error, Unavailable) else None

    def update(self, base: Conversation, turn: Turn) -> Update:
        """The conversation `base`, then `turn` with this reply as its newest variant."""
        others = (v for v in turn.variants if v.run_id not in (PENDING, self.variant.run_id))
        variants = (*others, self.variant)
        shown = replace(turn, variants=variants, chosen=len(variants) - 1)
        conversation = replace(base, turns=(*base.turns, shown))
        return Update(
            conversation, self.running, self.progress, self.checks, cut=self.cut, queued=self.queued, step=self.step
        )


def running_variant(conversation: Conversation) -> Variant | None:
    """The reply that is still being written in this conversation."""
    if not conversation.turns:
        return None
    return next((v for v in conversation.turns[-1].variants if v.state == "running"), None)
