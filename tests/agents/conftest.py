"""Fixtures of the gateway's tests: a real Valkey, a scripted replica and a gateway worker, all as processes."""

import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio

from deploy.store import EmbeddedStore, prepare
from tests.agents.processes import ADMIN_KEY, Child, Stack, run_stack


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """A store for the whole session; nobody may stop it."""
    folder = tmp_path_factory.mktemp("store")
    embedded = prepare(folder)
    child = store_child(embedded, folder)
    child.start()
    yield embedded
    child.stop()


@pytest.fixture(scope="session")
def stack(valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway with an engine that answers at 5 ms per token; nobody may stop a part of it."""
    with run_stack(Stack(tmp_path_factory.mktemp("stack"), valkey)) as running:
        yield running


@pytest.fixture
def own_stack(valkey: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway and an engine of the test's own, which it may stop."""
    with run_stack(Stack(tmp_path_factory.mktemp("own"), valkey)) as running:
        yield running


@pytest.fixture
def api(stack: Stack) -> httpx.Client:
    """A client of the session's gateway."""
    return stack.client


@pytest_asyncio.fixture
async def openai_client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    """The stock client of the session's gateway."""
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=ADMIN_KEY, max_retries=0) as client:
        yield client


def store_child(embedded: EmbeddedStore, folder: Path) -> Child:
    """The store as a process to start and stop."""
    port = int(embedded.url.rsplit(":", 1)[1].split("/")[0])
    return Child(embedded.argv, os.environ, folder / "store.log", lambda: _accepts(port))


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
