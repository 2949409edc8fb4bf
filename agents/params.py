"""The options a request gives its tasks, checked against what their plugins know."""

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from onebox.errors import BadRequest
from onebox.plugin import Plugin, TaskParams


def check_params(plugin: Plugin, params: Mapping[str, object]) -> TaskParams:
    """The plugin's own options out of untyped ones.

    Raises:
        BadRequest: an option is unknown or has a bad value.
    """
    try:
        return plugin.Params.model_validate(dict(params))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "params"
        known = ", ".join(repr(option) for option in plugin.Params.model_fields) or "none"
        raise BadRequest(
            f"Option {name!r} of task {plugin.name!r} is not usable: {first['msg'].lower()}. Known options: {known}.",
            param=f"params.{name}",
        ) from None


def fit_params(plan: Sequence[Plugin], params: Mapping[str, object]) -> list[TaskParams]:
    """Each step's options; in a chain every option goes to the steps that know it, and one must.

    Raises:
        BadRequest: an option is unknown to all of them, or has a bad value.
    """
    if len(plan) == 1:
        return [check_params(plan[0], params)]
    known = {name for plugin in plan for name in plugin.Params.model_fields}
    if stray := sorted(set(params) - known):
        raise BadRequest(f"Option {stray[0]!r} belongs to no task of the plan.", param=f"params.{stray[0]}")
    return [
        check_params(plugin, {name: value for name, value in params.items() if name in plugin.Params.model_fields})
        for plugin in plan
    ]
