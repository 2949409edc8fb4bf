"""The steps of a plan at work: what each of them is given, and what becomes of the rest when a user changes the plan.

How a message is found to ask for several steps is `agents.plan`; who carries them out is `agents.execution`.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from agents.instruction import split_instruction
from agents.journal import Journal
from agents.params import fit_params
from agents.run_scripts import NEXT_STEP
from agents.store import Store
from onebox.errors import BadRequest, StoreUnavailable
from onebox.events import Step
from onebox.plans import changed_steps
from onebox.plugin import Plugin

STEPS_MAX: Final = 3


def request_of(steps: Sequence[Step], index: int, message: str, previous: str) -> str:
    """What the plugin of a step is asked: its own words of the message, with the text that it works on."""
    step = steps[index]
    if step.input == "message":
        spans = sorted((other.start, other.end) for other in steps if other is not step and other.start >= 0)
        kept, at = [], 0
        for start, end in spans:
            kept.append(message[at:start])
            at = max(at, end)
        own = "".join((*kept, message[at:])).strip()
        return own or message
    words = step.words or _instruction(message)
    return f"{words}\n\n{previous}"


def replanned(steps: Sequence[Step], begun: int, plan: Sequence[str]) -> tuple[Step, ...] | None:
    """The steps of another plan whose first `begun` steps are these; None where it is this plan or they are others."""
    tasks = [step.task for step in steps]
    if list(plan) == tasks or list(plan[:begun]) != tasks[:begun]:
        return None
    return changed_steps(steps, begun, plan)


async def changed_by_user(
    journal: Journal, store: Store, run_key: str, steps: Sequence[Step], begun: int
) -> tuple[Step, ...] | None:
    """The steps as a user has changed them since the run began, as `replanned`; what was found is in the journal.

    From then on the step after the `begun` first ones counts as begun, and a plan without it is refused.
    """
    call = journal.open("plan", begun)
    if (entry := await journal.answer(call)) is not None:
        plan = entry.value
    else:
        try:
            raw = await store.run(NEXT_STEP, [run_key], [begun + 1])
        except StoreUnavailable:  # the run goes on as it was
            raw = None
        plan = raw.decode() if raw is not None else None
        journal.note(call, "value", plan)
    return replanned(steps, begun, plan.split(",")) if plan else None


def check_plan(plugins: Mapping[str, Plugin], plan: Sequence[str], params: Mapping[str, object]) -> tuple[str, ...]:
    """A plan that a caller has chosen.

    Raises:
        BadRequest: it is empty or too long, has a task that is not here, or the options fit none of its tasks.
    """
    if not 1 <= len(plan) <= STEPS_MAX:
        raise BadRequest(f"A plan has 1 to {STEPS_MAX} steps, not {len(plan)}. Name that many tasks.", param="plan")
    if unknown := next((task for task in plan if task not in plugins), None):
        known = ", ".join(repr(name) for name in plugins)
        raise BadRequest(f"Task {unknown!r} does not exist here; known: {known}. Choose of these.", param="plan")
    fit_params([plugins[task] for task in plan], params)
    return tuple(plan)


def _instruction(message: str) -> str:
    """What a message asks for, in its own words."""
    return " ".join(message[segment.start : segment.end] for segment in split_instruction(message).segments).strip()
