"""`wire`: the engine under test, once for each engine and each way to serve it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from onebox.settings import Settings
from onebox.sockets import free_port
from tests.processes import ROOT, FleetSpec, run_fleet, wait_until_ready
from tests.serving.wire import Wire

MAX_ONGOING, MAX_QUEUED = 4, 2
TOKEN = "contract"

SERVED = [
    "scripted-direct",
    "scripted-haproxy",
    "scripted-proxy",
    pytest.param("vllm-direct", marks=[pytest.mark.engine, pytest.mark.timeout(900)]),
    pytest.param("vllm-haproxy", marks=[pytest.mark.engine, pytest.mark.timeout(900)]),
]


@pytest.fixture(scope="session")
def start_directly(test_home: Path, tmp_path_factory: pytest.TempPathFactory) -> "Callable[..., object]":
    """A context manager that serves one replica under uvicorn: (values, *fault arguments) -> Wire."""

    @contextmanager
    def serve(values: dict[str, str], *fault: str) -> Iterator[Wire]:
        port = free_port()
        log = tmp_path_factory.mktemp("direct") / "server.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.serving.serve_directly", str(port), *fault],
                cwd=ROOT,
                env=FleetSpec({"home": str(test_home)} | values).environment(port, TOKEN),
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(process, url, TOKEN, log)
            yield _wire(url, TOKEN)
        finally:
            process.terminate()
            process.wait(60)

    return serve


@pytest.fixture(scope="session", params=SERVED)
def wire(request: pytest.FixtureRequest, test_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    """The engine under test."""
    engine, served = request.param.split("-")
    values = {
        "home": str(test_home),
        "engine": engine,
        "engine_max_ongoing": str(MAX_ONGOING),
        "engine_max_queued": str(MAX_QUEUED),
        "engine_coalesce_ms": "5",
    }
    if engine == "vllm":
        settings: Settings = request.getfixturevalue("smollm2_settings")
        values |= {"model": settings.model, "model_context": "2048"}
    if served == "direct":
        with request.getfixturevalue("start_directly")(values) as direct:
            yield direct
        return
    log = tmp_path_factory.mktemp("fleet") / "fleet.log"
    with run_fleet(FleetSpec(values | {"engine_ingress": served}), log) as fleet:
        yield _wire(fleet.url, fleet.token)


def _wire(url: str, token: str) -> Wire:
    card = httpx.get(f"{url}/v1/model", headers={"authorization": f"Bearer {token}"}).json()
    return Wire(url, token, card["context_length"], card["max_ongoing"] + card["max_queued"])
