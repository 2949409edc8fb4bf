"""Plans that a caller has chosen: for a new request, or for one that is being carried out."""

from collections.abc import Sequence

from agents.api.models import Wanted
from agents.api.schemas import OneboxOptions, ResponseOptions
from agents.gateway import Gateway
from agents.params import check_params
from agents.steps import check_plan
from onebox.errors import BadRequest, Conflict
from onebox.events import Replanned, Routed, StepStarted


def wanted_plan(gateway: Gateway, wanted: Wanted, options: OneboxOptions | ResponseOptions) -> tuple[str, ...]:
    """The plan that a request names; none where the router is to find one.

    Raises:
        BadRequest: it cannot be carried out, or the request names a task or a model beside it; or an option is not the
            named task's.
    """
    if wanted.task is not None:
        check_params(gateway.executor.plugins[wanted.task], options.params)
    if not options.plan:
        return ()
    if wanted.raw or wanted.task is not None:
        raise BadRequest("A plan names its tasks itself. Set model to 'auto' or leave the plan out.", param="plan")
    return check_plan(gateway.executor.plugins, options.plan, options.params)


async def change_plan(gateway: Gateway, tenant: str, run_id: str, plan: Sequence[str]) -> tuple[str, ...]:
    """Let a run go on with other steps; those that have begun stay.

    Raises:
        BadRequest: the plan cannot be carried out.
        Conflict: it changes what has begun, or nothing is left to be changed.
        UnknownRun: there is no such run.
    """
    record = await gateway.runs.record(tenant, run_id)
    chosen = check_plan(gateway.executor.plugins, plan, record.request.params)
    current: tuple[str, ...] = ()
    decided: Routed | None = None
    begun = 0
    for event in await gateway.runs.events(tenant, run_id):
        if isinstance(event, Routed | Replanned):
            current = event.plan
            decided = event if isinstance(event, Routed) else decided
            begun = max(begun, 1)  # its first step begins at once
        elif isinstance(event, StepStarted):
            begun = event.index + 1
    if record.state != "running" or begun >= len(current):
        raise Conflict(
            "The plan cannot be changed: its last step has begun or none is known yet. Send the message again with the "
            "plan wanted."
        )
    if chosen[:begun] != current[:begun]:
        raise Conflict(
            f"The first {begun} of the steps have begun: {list(current[:begun])!r}. Begin the plan with them."
        )
    match await gateway.runs.replan(tenant, run_id, chosen, begun):
        case "ended":
            raise Conflict("The run has ended. Send the message again with the plan wanted.")
        case "begun":
            raise Conflict("Another step has begun meanwhile. Look at the run's steps and change those that are left.")
    gateway.corrections.replanned(record, decided, chosen)
    return chosen
