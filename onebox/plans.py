"""The steps of a plan as events tell them, for whoever carries them out or shows them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from onebox.events import Replanned, Routed, Step


def steps_of(routed: Routed) -> tuple[Step, ...]:
    """The steps of a decision, one for each task of its plan."""
    if routed.steps:
        return routed.steps
    return tuple(Step(task, _input(index)) for index, task in enumerate(routed.plan or (routed.task,)))


def changed_steps(steps: Sequence[Step], begun: int, plan: Sequence[str]) -> tuple[Step, ...]:
    """The steps of another plan that begins with the same `begun` steps; a step keeps the words that ask for it."""
    known, changed = list(steps[begun:]), list(steps[:begun])
    for task in plan[begun:]:
        same = next((step for step in known if step.task == task), Step(task, "previous"))
        if same in known:
            known.remove(same)
        changed.append(replace(same, input=_input(len(changed))))
    return tuple(changed)


def replan(routed: Routed, change: Replanned) -> Routed:
    """The decision as a user has changed it."""
    return replace(routed, plan=change.plan, steps=changed_steps(steps_of(routed), change.index, change.plan))


def _input(index: int) -> Literal["message", "previous"]:
    return "previous" if index else "message"
