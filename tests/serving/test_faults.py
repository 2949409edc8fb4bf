"""What the wire says when an engine misbehaves in the middle of a reply."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx
import orjson
import pytest

from deploy.supervisor import FATAL
from tests.processes import ROOT
from tests.serving.wire import Wire, request

Serve = Callable[..., AbstractContextManager[Wire]]
FAST = {"engine": "scripted", "scripted_ttft_ms": "1", "scripted_itl_ms": "2", "engine_coalesce_ms": "0"}


async def test_engine_that_fails_mid_reply_ends_it_with_an_error_line(start_directly: Serve) -> None:
    with start_directly(FAST, "fail", "30") as wire:
        reply = await wire.generate(sampling={"max_tokens": 100})
        assert len(reply.ids) == 30
        assert reply.end["error"]["code"] == "engine_failed"  # type: ignore[index]  # JSON object
        assert reply.end["error"]["retryable"] is True  # type: ignore[index]  # JSON object
        assert await wire.running() == 0


async def test_engine_that_fails_before_the_first_token_answers_with_a_status(start_directly: Serve) -> None:
    with start_directly(FAST, "fail", "24") as wire:
        refused = await wire.refused(resume_token_ids=list(range(24)))
        assert refused.status_code == 502
        assert refused.json()["error"]["code"] == "engine_failed"
        assert int(refused.headers["retry-after"]) >= 1


async def test_crashed_engine_breaks_every_reply_and_is_unhealthy(start_directly: Serve) -> None:
    with start_directly(FAST, "crash", "40") as wire:
        replies = await asyncio.gather(*(wire.generate(f"number {n}", sampling={"max_tokens": 100}) for n in range(3)))
        assert all("error" in reply.end for reply in replies)
        async with wire.client() as client:
            for path in ("/healthz", "/readyz"):
                refused = await client.get(path)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "unavailable"
            assert (await client.post("/v1/generate", json=request("hello"))).status_code == 503


async def test_reply_that_hangs_ends_when_its_reader_leaves(start_directly: Serve) -> None:
    with start_directly(FAST, "hang", "30") as wire:
        seen = b""
        async with wire.client() as client:
            with contextlib.suppress(httpx.ReadTimeout):
                body = request("hello", sampling={"max_tokens": 100})
                async with client.stream("POST", "/v1/generate", json=body, timeout=0.5) as response:
                    async for chunk in response.aiter_bytes():
                        seen += chunk
            assert sum(len(orjson.loads(line)["ids"]) for line in seen.splitlines()) == 30
            while await wire.running():
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("instance", ["token", "port"])
async def test_fleet_that_cannot_start_says_why_in_one_line(instance: str, free_port: Callable[[], int]) -> None:
    port = free_port()
    environment = {"ONEBOX_ENGINE": "scripted", "ONEBOX_ENGINE_PORT": str(port)}
    if instance == "port":
        environment["ONEBOX_INTERNAL_TOKEN"] = "secret"
    listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", port)
    async with listener:
        fleet = await asyncio.create_subprocess_exec(
            *("env", *(f"{name}={value}" for name, value in environment.items())),
            *(sys.executable, "-m", "deploy.fleet"),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await fleet.communicate()
    assert fleet.returncode == FATAL
    (line,) = stderr.decode().splitlines()
    assert {"token": "ONEBOX_INTERNAL_TOKEN", "port": f"Port {port} is taken"}[instance] in line
