"""The stacks that faults are let loose on: a real Valkey behind the proxy, engines, gateway workers.

`LightBox` starts in seconds: scripted replicas behind a balancer, gateway workers on one socket. `FullBox` is the
product as users run it, `python -m deploy up` with real Ray Serve, HAProxy and page. Both start dead processes again.
"""

import os
import secrets
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Literal, Self
from urllib.parse import urlsplit

import httpx
import psutil
import redis

from deploy import store
from onebox import sockets
from tests.faults.balancer import Balancer
from tests.faults.disk import SmallDisk
from tests.faults.keeper import Keeper
from tests.faults.redis_proxy import Command, RedisProxy
from tests.processes import ROOT

Role = Literal["replica", "gateway", "page", "store", "controller", "ingress", "supervisor"]
KEY: Final = "ob-faults-key-0123456789abcdef"
TENANT: Final = "default"
MODULES: Final = {"gateway": "agents", "page": "ui"}
REPLICAS: Final = 2
WORKERS: Final = 2
READY_WITHIN_S: Final = 300.0


class Box(ABC):
    """One running stack. `api_url` stays the same whatever is restarted; `direct` reaches the store past the proxy."""

    roles: Sequence[Role]

    def __init__(self, folder: Path, extra: Mapping[str, str] | None = None, root: Path = ROOT) -> None:
        self.folder = folder
        self.root = root
        self.extra = dict(extra or {})
        self.headers = {"authorization": f"Bearer {KEY}"}
        self.token = secrets.token_hex(8)
        self._stack = ExitStack()
        self.on_reply: Callable[[Command, bytes], None] | None = None

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.disk = self._stack.enter_context(SmallDisk(self.folder / "disk"))
            embedded = store.prepare(self.folder / "disk" / "store")
            address = urlsplit(embedded.url)
            assert address.port is not None
            self.store = self._keep("store", embedded.argv)
            self.direct = redis.Redis.from_url(embedded.url, protocol=2, socket_timeout=5)
            self._stack.callback(self.direct.close)
            self._wait(lambda: bool(self.direct.ping()), "store")
            self.proxy = self._stack.enter_context(RedisProxy(address.port, self._saw))
            self.redis_url = f"redis://:{address.password}@127.0.0.1:{self.proxy.port}/0"
            self._begin()
            self.wait_until_ready()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    @abstractmethod
    def api_url(self) -> str:
        """Where users knock."""

    @abstractmethod
    def _begin(self) -> None:
        """Start everything that needs the store."""

    @abstractmethod
    def victims(self, role: Role) -> list[psutil.Process]:
        """The processes that have this role now."""

    def wait_until_ready(self, within_s: float = READY_WITHIN_S) -> None:
        """Returns once a token can be had."""
        with httpx.Client(base_url=self.api_url, timeout=5.0, trust_env=False) as client:
            self._wait(lambda: client.get("/readyz").status_code == 200, "the stack", within_s)

    def worker_of(self, command: Command) -> psutil.Process | None:
        """The gateway worker that sent this store command."""
        for process in self.victims("gateway"):
            with suppress(psutil.Error):
                if any(link.laddr.port == command.peer_port for link in process.net_connections("tcp")):
                    return process
        return None

    def _saw(self, command: Command, reply: bytes) -> None:
        if self.on_reply is not None:
            self.on_reply(command, reply)

    def _keep(
        self, name: str, argv: Sequence[str], pass_fds: tuple[int, ...] = (), pause_s: float = 0.2, **settings: str
    ) -> Keeper:
        log = self.folder / f"{name}.log"
        keeper = Keeper(name, argv, self._environment(**settings), log, pass_fds, pause_s, self.root)
        keeper.start()
        self._stack.callback(keeper.stop)
        return keeper

    def _environment(self, **settings: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ONEBOX_")}
        home = str(self.folder / "home")
        own = {"home": home, "admin_key": KEY, "internal_token": self.token} | self.extra | settings
        environment = inherited | {f"ONEBOX_{name.upper()}": value for name, value in own.items()}
        return environment | {"PYTHONPATH": str(self.root)}

    def _wait(self, condition: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError, redis.RedisError):
                if condition():
                    return
            time.sleep(0.05)
        logs = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in self.folder.glob("*.log"))
        raise RuntimeError(f"{what} did not become ready within {within_s:g} s:\n{logs}")


class LightBox(Box):
    """Store, scripted replicas and gateway workers, each started again 0.2 s after its death. No Ray, no page."""

    roles = ("replica", "gateway", "store")

    def __init__(
        self,
        folder: Path,
        extra: Mapping[str, str] | None = None,
        root: Path = ROOT,
        *,
        replicas: int = REPLICAS,
        workers: int = WORKERS,
    ) -> None:
        super().__init__(folder, extra, root)
        self._replica_count, self._worker_count = replicas, workers

    @property
    def api_url(self) -> str:
        """The workers' shared socket."""
        return f"http://127.0.0.1:{sockets.port_of(self._listener)}"

    def _begin(self) -> None:
        self._listener: socket.socket = self._stack.enter_context(sockets.listen("127.0.0.1", 0, "ONEBOX_API_PORT"))
        ports = [sockets.free_port() for _ in range(self._replica_count)]
        self._replicas = [
            self._keep(
                f"replica-{number}", (sys.executable, "-m", "tests.agents.scripted_replica"), engine_port=str(port)
            )
            for number, port in enumerate(ports)
        ]
        balancer = self._stack.enter_context(Balancer(ports, self.token))
        settings = {
            "redis_url": self.redis_url,
            "engine_url": f"http://127.0.0.1:{balancer.port}",
            "api_port": str(sockets.port_of(self._listener)),
        }
        descriptor = self._listener.fileno()
        worker = (sys.executable, "-m", "agents", "--fd", str(descriptor))
        self._workers = [
            self._keep(f"gateway-{number}", worker, (descriptor,), **settings) for number in range(self._worker_count)
        ]

    def victims(self, role: Role) -> list[psutil.Process]:
        """Those of the keepers."""
        keepers = {"replica": self._replicas, "gateway": self._workers, "store": [self.store]}.get(role, [])
        return _processes([keeper.pid for keeper in keepers])


class FullBox(Box):
    """The product. The store is the test's own, so that the proxy can stand before it."""

    roles = ("replica", "gateway", "page", "store", "controller", "ingress", "supervisor")

    def __init__(self, folder: Path, extra: Mapping[str, str] | None = None, root: Path = ROOT) -> None:
        super().__init__(folder, extra, root)
        self._api, self._page, self._engine = (sockets.free_port() for _ in range(3))

    @property
    def api_url(self) -> str:
        """The API."""
        return f"http://127.0.0.1:{self._api}"

    def _begin(self) -> None:
        self.launcher = self._keep(
            "up",
            (sys.executable, "-m", "deploy", "up"),
            pause_s=0.5,
            redis_url=self.redis_url,
            engine="scripted",
            engine_replicas=str(REPLICAS),
            gateway_workers=str(WORKERS),
            api_port=str(self._api),
            ui_port=str(self._page),
            engine_port=str(self._engine),
        )

    def victims(self, role: Role) -> list[psutil.Process]:
        """Found below the launcher's process, by their modules and by what Ray calls them."""
        if role == "store":
            return _processes([self.store.pid])
        if role == "supervisor":
            return _processes([self.launcher.pid])
        children = _below(self.launcher.pid, recursive=False)
        if role in MODULES:
            return [process for process in children if _runs(process, MODULES[role])]
        engines = [process for process in children if _runs(process, "deploy.fleet")]
        return [process for engine in engines for process in _below(engine.pid) if _ray_role(process) == role]


def kill(process: psutil.Process) -> None:
    """kill -9; a process that is gone is fine."""
    with suppress(psutil.Error):
        process.kill()


def pause(process: psutil.Process) -> None:
    """SIGSTOP."""
    with suppress(psutil.Error):
        process.suspend()


def resume(process: psutil.Process) -> None:
    """SIGCONT."""
    with suppress(psutil.Error):
        process.resume()


def _processes(pids: Sequence[int | None]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        if pid is not None:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def _below(pid: int | None, *, recursive: bool = True) -> list[psutil.Process]:
    if pid is None:
        return []
    with suppress(psutil.Error):
        return sorted(psutil.Process(pid).children(recursive=recursive), key=lambda process: process.pid)
    return []


def _runs(process: psutil.Process, module: str) -> bool:
    with suppress(psutil.Error):
        return process.cmdline()[1:3] == ["-m", module]
    return False


def _ray_role(process: psutil.Process) -> Role | None:
    with suppress(psutil.Error):
        title, name = " ".join(process.cmdline()), process.name()
        if "ServeReplica" in title:
            return "replica"
        if "ServeController" in title:
            return "controller"
        if name == "haproxy" or "HAProxyManager" in title or "ProxyActor" in title:
            return "ingress"
    return None
