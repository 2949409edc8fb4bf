"""A Ray cluster of several nodes on this machine, each in a network namespace of its own with an address of its own.

So every node has all ports to itself, as a machine has, and can be taken off the network and killed as one.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploy import ray_environment
from onebox.settings import Settings
from tests.processes import ROOT

GCS_PORT = 6379
STEP_TIMEOUT_S = 240
RAY = Path(sys.executable).with_name("ray")
# Ray finds a silent node dead after a minute by default; these tests wait for it.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Node:
    """One node: its namespace, its address and, while it lives, its `ray start`."""

    namespace: str
    address: str
    folder: Path
    environment: Mapping[str, str]
    process: "subprocess.Popen[bytes] | None" = None

    def run(self, *argv: str, **changed: str) -> str:
        """What a command says that runs on this node to its end."""
        environment = {**self.environment, **{f"ONEBOX_{name.upper()}": value for name, value in changed.items()}}
        done = subprocess.run(
            ("ip", "netns", "exec", self.namespace, *argv),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def pids(self) -> list[int]:
        """Every process on this node."""
        listed = subprocess.run(("ip", "netns", "pids", self.namespace), capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def vanish(self) -> None:
        """Leave the network without a word, then die with everything on it."""
        _ip("link", "set", self.namespace, "down")
        self.kill()

    def kill(self) -> None:
        """End every process on this node at once."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            self.process = None


@dataclass
class Cluster:
    """The nodes; the first is the head. `settings` are ONEBOX_* variables of each of them, `token` is Ray's own."""

    folder: Path
    settings: Mapping[str, str]
    name: str = field(default_factory=lambda: f"ob{secrets.token_hex(3)}")
    nodes: list[Node] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    def __post_init__(self) -> None:
        """Choose a network; nothing is made yet."""
        self.scratch = Path("/tmp") / self.name  # short: unix socket paths end at 107 bytes
        self.subnet = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"

    @property
    def head(self) -> Node:
        """The node with Ray's own services and Serve's controller."""
        return self.nodes[0]

    @property
    def gcs(self) -> str:
        """Where a node or a driver joins."""
        return f"{self.head.address}:{GCS_PORT}"

    def connect(self) -> None:
        """Make the bridge between the nodes, on which this process has an address too."""
        _ip("link", "add", self.name, "type", "bridge")
        _ip("address", "add", f"{self.subnet}.1/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def add(self) -> Node:
        """Start another node and wait until it has joined."""
        number = len(self.nodes)
        node = self._plug_in(number)
        self.nodes.append(node)
        head = ("--head", f"--port={GCS_PORT}", "--include-dashboard=false")
        joins = head if number == 0 else (f"--address={self.gcs}",)
        with (node.folder / "ray.log").open("wb") as log:
            node.process = subprocess.Popen(
                (
                    "ip", "netns", "exec", node.namespace, str(RAY), "start", *joins,
                    f"--node-ip-address={node.address}", f"--temp-dir={self.scratch / str(number) / 'ray'}",
                    "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block",
                ),
                cwd=ROOT,
                env=dict(node.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._wait_for(node)
        return node

    def disconnect(self) -> None:
        """End all nodes and take the network away."""
        for node in self.nodes:
            node.kill()
            _ip("netns", "delete", node.namespace)
        _ip("link", "delete", self.name)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _plug_in(self, number: int) -> Node:
        namespace, address = f"{self.name}n{number}", f"{self.subnet}.{number + 2}"
        _ip("netns", "add", namespace)
        _ip("link", "add", namespace, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", namespace, "master", self.name, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", f"{self.subnet}.1"),
        ):
            _ip("-n", namespace, *command)
        folder = self.folder / namespace
        folder.mkdir()
        return Node(namespace, address, folder, self._environment(folder, self.scratch / str(number)))

    def _environment(self, folder: Path, scratch: Path) -> dict[str, str]:
        """What a node has in its environment: Ray's part as `deploy.fleet --environment` says, and Onebox's."""
        scratch.mkdir(parents=True)
        settings = Settings.model_validate(self.settings)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ONEBOX_")}
        own = {f"ONEBOX_{name.upper()}": value for name, value in {**self.settings, "home": str(folder)}.items()}
        ray = ray_environment.every_node(settings) | ray_environment.own_folder(settings, scratch)
        return inherited | ray | HEALTH | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} | own

    def _wait_for(self, node: Node) -> None:
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while time.monotonic() < deadline:
            assert node.process is not None
            assert node.process.poll() is None, (node.folder / "ray.log").read_text()[-3000:]
            if b"Ray runtime started" in (node.folder / "ray.log").read_bytes():
                return
            time.sleep(0.2)
        raise AssertionError(f"node {node.address} did not join:\n{(node.folder / 'ray.log').read_text()[-3000:]}")


@contextmanager
def run_cluster(folder: Path, settings: Mapping[str, str], nodes: int) -> Iterator[Cluster]:
    """A cluster of this many nodes, gone on leaving. Skips where network namespaces may not be made."""
    probe = f"ob{secrets.token_hex(3)}p"
    if subprocess.run(("ip", "netns", "add", probe), capture_output=True).returncode != 0:
        pytest.skip("network namespaces cannot be made here: they need root")
    _ip("netns", "delete", probe)
    cluster = Cluster(folder, settings)
    cluster.connect()
    try:
        for _ in range(nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.disconnect()


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, capture_output=True)
