"""`up`: the whole product on one machine, in the foreground, until Ctrl-C.

The page and the API come first, so a user can look and type while the model loads; then the model is fetched if
need be, then the engine fleet. On a cluster the manifests do this work.
"""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Mapping

import httpx
import psutil

from agents.keys import ensure_admin_key
from agents.shared_metrics import metrics_folder
from agents.store import Store
from deploy import checks, instance, store
from deploy.ray_environment import python_path
from deploy.screen import Screen
from deploy.supervisor import Program, Supervisor
from onebox import sockets
from onebox.errors import SetupError, StoreUnavailable
from onebox.fleet_spec import read_fleet
from onebox.settings import Settings
from serving.fetch import ensure

READY_POLL_S = 0.5
PROBE_TIMEOUT_S = 10.0


async def up(settings: Settings, screen: Screen) -> None:
    """Run everything until a signal asks to stop.

    Raises:
        SetupError: something is missing or taken; nothing is left running.
    """
    sockets.check_bind(settings)
    checks.check_disk(settings)
    checks.check_adapters(settings)
    checks.check_memory(settings)
    with instance.only_one(settings.home_dir):
        api = sockets.listen(settings.host, settings.api_port, "ONEBOX_API_PORT")
        page = sockets.listen(settings.host, settings.ui_port, "ONEBOX_UI_PORT")
        try:
            async with Launch(settings, screen, api, page) as launch:
                await launch.run()
        finally:
            api.close()
            page.close()


class Launch:
    """One run of `up`: settings with the secrets and addresses of this run, and its supervisor."""

    def __init__(self, settings: Settings, screen: Screen, api: socket.socket, page: socket.socket) -> None:
        engine_port = settings.engine_port or sockets.free_port()
        self._embedded = None if settings.redis_url else store.prepare(settings.home_dir / "store")
        self._api, self._page = api, page
        self.settings = settings.model_copy(
            update={
                "api_port": sockets.port_of(api),
                "ui_port": sockets.port_of(page),
                "engine_port": engine_port,
                "engine_url": f"http://127.0.0.1:{engine_port}",
                "redis_url": settings.redis_url or (self._embedded.url if self._embedded else None),
            }
        )
        self.screen = screen
        self.id = uuid.uuid4().hex
        token, ui_key = secrets.token_urlsafe(32), "ob-ui-" + secrets.token_urlsafe(32)
        env = {
            **os.environ,
            **self._environment({"internal_token": token, "ui_key": ui_key}),
            "PYTHONPATH": python_path(),
            "PYTHONUNBUFFERED": "1",
            "OPENBLAS_NUM_THREADS": "1",  # a worker that learns from corrections takes one core, not all
        }
        self.supervisor = Supervisor(self.id, env, self._publish)
        self._stop = asyncio.Event()

    async def __aenter__(self) -> "Launch":
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, self._stop.set)
        await self.supervisor.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.screen.step("Stopping …")
        await self.supervisor.__aexit__(*error)
        self.screen.step("Stopped; conversations are kept.")

    async def run(self) -> None:
        """Start everything, say when it is ready, wait for the end."""
        work = asyncio.create_task(self._start_and_wait())
        stop = asyncio.create_task(self._stop.wait())
        broken = asyncio.create_task(self.supervisor.fail())
        try:
            done, _ = await asyncio.wait({work, stop, broken}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (work, stop, broken):
                task.cancel()
            await asyncio.gather(work, stop, broken, return_exceptions=True)

    async def _start_and_wait(self) -> None:
        settings, screen = self.settings, self.screen
        shutil.rmtree(metrics_folder(settings.home_dir), ignore_errors=True)  # an earlier instance's counts
        if self._embedded is not None:
            self._start("store", self._embedded.argv)
        new_key = await self._admin_key()
        for number in range(settings.gateway_workers):
            self._start(f"gateway-{number}", (*self._module("agents", self._api), "--place", str(number)), self._api)
        self._start("page", self._module("ui", self._page), self._page)
        screen.step(
            f"Store and API are up at {settings.gateway_url}; the page is at {self._page_url} while the model loads."
        )
        if new_key is not None:
            screen.say(f"\n  Your API key, shown only this once: [bold]{new_key}[/bold]\n")
        models = [model.settings for model in read_fleet(settings).here]
        for model in models:
            if model.engine == "vllm":
                await asyncio.to_thread(ensure, model, screen.report)
        names = ", ".join(model.model if model.engine == "vllm" else model.engine for model in models)
        screen.step(f"Loading the engine ({names}) …")
        if models:
            self._start("engine", self._module("deploy.fleet"), stop_timeout_s=settings.drain_timeout_s)
        await self._ready()
        screen.step(f"[bold green]Ready.[/bold green] Open [bold]{self._page_url}[/bold]  (Ctrl-C stops everything)")
        await asyncio.Event().wait()

    def _start(
        self, name: str, argv: tuple[str, ...], listener: socket.socket | None = None, stop_timeout_s: float = 10.0
    ) -> None:
        log = self.settings.home_dir / "logs" / f"{name}.log"
        fds = () if listener is None else (listener.fileno(),)
        self.supervisor.start(Program(name, argv, log, self.supervisor.env, fds, stop_timeout_s))

    def _module(self, module: str, listener: socket.socket | None = None) -> tuple[str, ...]:
        fd = () if listener is None else ("--fd", str(listener.fileno()))
        return (sys.executable, "-m", module, *fd)

    async def _admin_key(self) -> str | None:
        """Wait for the store; make the admin key where there is none at all. Returns a new key."""
        for _ in range(100):
            client = Store(self.settings)
            try:
                await client.ping()
                return await ensure_admin_key(client) if self.settings.admin_key is None else None
            except StoreUnavailable:
                await asyncio.sleep(0.1)
            finally:
                await client.close()
        log = self.settings.home_dir / "logs" / "store.log"
        where = "ONEBOX_REDIS_URL" if self._embedded is None else f"its log {str(log)!r}"
        raise SetupError(f"The Redis store does not answer: it did not start or cannot be reached. Look at {where}.")

    async def _ready(self) -> None:
        async with httpx.AsyncClient(base_url=self._api_url, timeout=PROBE_TIMEOUT_S) as client:
            while True:
                try:
                    if (await client.get("/readyz")).status_code == httpx.codes.OK:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(READY_POLL_S)

    def _publish(self) -> None:
        me = psutil.Process()
        children = {name: child.pid for name, child in self.supervisor.children.items() if child.pid is not None}
        instance.write(
            self.settings.home_dir,
            instance.Instance(self.id, me.pid, me.create_time(), self._api_url, self._page_url, children),
        )

    def _environment(self, secret: Mapping[str, str]) -> dict[str, str]:
        settings = self.settings
        return {
            "ONEBOX_INTERNAL_TOKEN": settings.internal_token.get_secret_value()
            if settings.internal_token
            else secret["internal_token"],
            "ONEBOX_UI_KEY": settings.ui_key.get_secret_value() if settings.ui_key else secret["ui_key"],
            "ONEBOX_HOME": str(settings.home_dir),
            "ONEBOX_REDIS_URL": str(settings.redis_url),
            "ONEBOX_API_PORT": str(settings.api_port),
            "ONEBOX_UI_PORT": str(settings.ui_port),
            "ONEBOX_ENGINE_PORT": str(settings.engine_port),
            "ONEBOX_ENGINE_URL": settings.engine_url,
        }

    @property
    def _api_url(self) -> str:
        return f"http://{self._reachable}:{self.settings.api_port}"

    @property
    def _page_url(self) -> str:
        return f"http://{self._reachable}:{self.settings.ui_port}"

    @property
    def _reachable(self) -> str:
        return "127.0.0.1" if self.settings.host in {"0.0.0.0", "::"} else self.settings.host
