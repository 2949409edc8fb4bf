"""A fleet on several nodes while one dies, one joins and a model is upgraded: no stream fails, no text differs."""

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from deploy.store import EmbeddedStore
from onebox.client import Client
from onebox.events import Completed, Event, TextDelta
from onebox.messages import user
from tests.agents.conftest import valkey as valkey
from tests.agents.processes import ADMIN_KEY, Stack, run_stack, until
from tests.cluster.nodes import Cluster, Node, run_cluster

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

STREAMS = 12
REPLICAS = 6
FILE = """
[models.small]
replicas = 6
replicas_per_node = 2

[models.large]
replicas = 1

[models.small.settings]
engine_max_ongoing = {places}

[tasks]
default = "small"
"""


@dataclass
class Readers:
    """Clients that read replies without a pause, each its own prompt; `failed` tells what went wrong."""

    client: Client
    expected: dict[int, str] = field(default_factory=dict)
    whole: int = 0
    failed: list[str] = field(default_factory=list)

    async def read_on(self, number: int) -> None:
        """One reader, until it is cancelled."""
        while True:
            text, last = await self._read(number)
            if isinstance(last, Completed) and text == self.expected.setdefault(number, text):
                self.whole += 1
            else:
                self.failed.append(f"reader {number}: {last!r} after {len(text)} characters")

    async def more(self, replies: int) -> None:
        """Returns once this many more replies are whole."""
        enough = self.whole + replies
        async with asyncio.timeout(120):
            while self.whole < enough:
                await asyncio.sleep(0.05)

    async def _read(self, number: int) -> tuple[str, Event]:
        messages = [user(f"Tell story {number}")]
        events = [event async for event in self.client.stream(messages, model="chat")]
        return "".join(event.text for event in events if isinstance(event, TextDelta)), events[-1]


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[Readers]:
    """Readers at work."""
    async with Client(url, ADMIN_KEY) as client, asyncio.TaskGroup() as group:
        readers = Readers(client)
        tasks = [group.create_task(readers.read_on(number)) for number in range(STREAMS)]
        try:
            yield readers
        finally:
            for task in tasks:
                task.cancel()


def deploy(cluster: Cluster, file: Path, **changed: str) -> None:
    """The operator's command, on the head."""
    url = f"http://{cluster.head.address}:8100"
    cluster.head.run(
        sys.executable, "-m", "deploy.fleet", "--address", cluster.gcs, fleet_file=str(file), engine_url=url, **changed
    )


def doors(cluster: Cluster, model: str, token: str) -> set[str]:
    """The doors of a model's replicas, as one of them tells."""
    url = f"http://{cluster.head.address}:8100/m/{model}/v1/fleet"
    reply = httpx.get(url, headers={"authorization": f"Bearer {token}"}, timeout=5.0).raise_for_status()
    return {replica["door"] for replica in reply.json()["replicas"] if not replica["draining"]}


def at(node: Node, found: set[str]) -> set[str]:
    """Those of the doors that are on this node."""
    return {door for door in found if f"//{node.address}:" in door}


async def spread(cluster: Cluster, token: str, nodes: list[Node]) -> set[str]:
    """The doors of `small` once all its replicas are up and on these nodes only, no more than two on each."""
    found: set[str] = set()

    def settled() -> bool:
        nonlocal found
        found = doors(cluster, "small", token)
        here = [len(at(node, found)) for node in nodes]
        return len(found) == REPLICAS == sum(here) and max(here) <= 2

    await asyncio.to_thread(until, settled, 120.0)
    return found


@pytest.mark.parametrize("ingress", ["haproxy", "proxy"])
async def test_streams_outlive_a_node_a_newcomer_and_an_upgrade(
    tmp_path: Path, valkey: EmbeddedStore, ingress: str
) -> None:
    token, file = secrets.token_hex(8), tmp_path / "fleet.toml"
    settings = {"engine": "scripted", "internal_token": token, "engine_ingress": ingress, "scripted_itl_ms": "8"}
    file.write_text(FILE.format(places=64))
    with run_cluster(tmp_path, settings, nodes=3) as cluster:
        deploy(cluster, file)
        await spread(cluster, token, cluster.nodes)
        url = f"http://{cluster.head.address}:8100"
        extra = {"fleet_file": str(file), "engine_url": url, "internal_token": token, "router_engine": "false"}
        with run_stack(Stack(tmp_path, valkey, extra), engine=False) as stack:
            until(lambda: stack.client.get("/readyz").status_code == 200)
            async with reading(stack.url) as readers:
                await readers.more(2 * STREAMS)

                lost = cluster.nodes[1]
                assert at(lost, doors(cluster, "small", token))
                lost.vanish()
                await readers.more(2 * STREAMS)

                newcomer = await asyncio.to_thread(cluster.add)
                living = [node for node in cluster.nodes if node is not lost]
                old = await spread(cluster, token, living)
                assert at(newcomer, old)
                await asyncio.to_thread(until, lambda: len(doors(cluster, "large", token)) == 1, 60.0)
                untouched = doors(cluster, "large", token)
                await readers.more(STREAMS)

                file.write_text(FILE.format(places=48))
                await asyncio.to_thread(deploy, cluster, file)
                new = await spread(cluster, token, living)
                await readers.more(STREAMS)
            assert readers.failed == []
            assert not old & new
            assert doors(cluster, "large", token) == untouched
