"""What tests of the page share: the fake gateway in this process, the real stack and a browser."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import uvicorn

from onebox.sockets import free_port
from tests.ui.fake_gateway import FakeGateway
from tests.ui.stack import Stack, run_stack


@dataclass(frozen=True, slots=True)
class Fake:
    """A fake gateway and where it listens."""

    gateway: FakeGateway
    url: str


@asynccontextmanager
async def serve_fake(gateway: FakeGateway) -> AsyncIterator[str]:
    """The fake gateway on a free port, in this loop."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(gateway.app, port=port, log_level="error", ws="none", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    gateway = FakeGateway(itl_s=0.002, ttft_s=0.0, words=20)
    async with serve_fake(gateway) as url:
        yield Fake(gateway, url)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything real but the model."""
    with run_stack(tmp_path_factory.mktemp("ui"), scripted_itl_ms="20", max_tokens_default="400") as running:
        yield running
