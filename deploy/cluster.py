"""The fleet on a Ray cluster that already runs: put there, changed while it serves, taken away.

What it puts there is the same Serve config that `python -m deploy.fleet --config` prints for `serve deploy` and
KubeRay: applications whose lines have not changed go on undisturbed, the others are replaced replica by replica.
Secrets are no part of it: every node has `ONEBOX_INTERNAL_TOKEN` in its environment. The fleet of one machine is
`deploy.fleet`.
"""

import logging
import time
from typing import Any, Final

import yaml

from onebox.errors import SetupError
from onebox.fleet_spec import FleetSpec, ModelSpec, per_model
from onebox.settings import Settings

BUILDER: Final = "serving.deployment:build_app"
LOOK_EVERY_S: Final = 0.5
READY_TIMEOUT_S: Final = 1800.0

_log = logging.getLogger("onebox.cluster")


def serve_config(spec: FleetSpec, settings: Settings) -> dict[str, Any]:
    """The config of all models for Ray Serve, without secrets."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": settings.engine_port},
        "applications": [
            {
                "name": model.application,
                "route_prefix": model.route_prefix,
                "import_path": BUILDER,
                "args": _args(model),
            }
            for model in spec.here
        ],
    }


def serve_config_text(spec: FleetSpec, settings: Settings) -> str:
    """The same as YAML."""
    return yaml.safe_dump(serve_config(spec, settings), sort_keys=False, allow_unicode=True)


def deploy(address: str, spec: FleetSpec, settings: Settings) -> None:
    """Make the cluster serve these models and no others; returns once all of them are up.

    Raises:
        SetupError: the cluster cannot be reached, or a model does not start.
    """
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _connect(address, settings)
    schema = ServeDeploySchema.model_validate(serve_config(spec, settings))
    serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
    # What `serve deploy` does through the dashboard, which a cluster need not have.
    client = _get_global_client()
    assert client is not None, "Serve has been started"
    client.deploy_apps(schema)
    _wait_until_up([model.application for model in spec.here])


def remove(address: str, settings: Settings) -> None:
    """Take the whole fleet off the cluster, which goes on without it.

    Raises:
        SetupError: the cluster cannot be reached.
    """
    from ray import serve

    _connect(address, settings)
    serve.shutdown()


def _connect(address: str, settings: Settings) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="onebox")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise SetupError(
            f"The Ray cluster at {address!r} cannot be reached: {str(error).splitlines()[0]} "
            "Run this on one of its nodes and give HOST:PORT as `ray start --head` said it, or 'auto'."
        ) from None
    logging.getLogger("ray").setLevel(settings.log_level.upper())


def _wait_until_up(names: list[str]) -> None:
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    bad = {ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY}
    until = time.monotonic() + READY_TIMEOUT_S
    waiting = set(names)
    while waiting:
        applications = serve.status().applications
        for name in sorted(waiting & set(applications)):
            status = applications[name]
            if status.status == ApplicationStatus.RUNNING:
                _log.info("%s is up", name)
                waiting.discard(name)
            elif status.status in bad:
                raise SetupError(
                    f"Application {name!r} does not start: {_told(status)} "
                    "Its log is on the node of its replica, in /tmp/ray/session_latest/logs/serve."
                )
        if time.monotonic() > until:
            raise SetupError(
                f"{', '.join(sorted(waiting))} did not come up within {READY_TIMEOUT_S:g} s. Look at `serve status`: "
                "often no node has the CPUs or GPUs a replica asks for."
            )
        time.sleep(LOOK_EVERY_S)


def _told(status: Any) -> str:
    """What Serve says of an application that failed, in one line."""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for message in messages for line in str(message).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    return (named or lines or ["Serve gives no reason."])[-1]


def _args(model: ModelSpec) -> dict[str, Any]:
    """What differs from the defaults; the rest comes from the nodes."""
    fields = type(model.settings).model_fields
    values = model.settings.model_dump(mode="json", include={name for name in fields if per_model(name)})
    return {name: value for name, value in values.items() if value != fields[name].default} | {
        "engine_url": model.settings.engine_url
    }
