"""`wire`: the engine under test, once for each engine and each way to serve it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from onebox.settings import Settings
from onebox.sockets import free_port
from serving.models import resolve
from tests.collector import Collector, run_collector
from tests.processes import ROOT, FleetSpec, run_fleet, wait_until_ready
from tests.serving.lora import make_adapter
from tests.serving.wire import Wire

MAX_ONGOING, MAX_QUEUED = 4, 2
TOKEN = "contract"
ADAPTERS = ("pirate", "poet")

SERVED = [
    "scripted-direct",
    "scripted-haproxy",
    "scripted-proxy",
    pytest.param("vllm-direct", marks=[pytest.mark.engine, pytest.mark.timeout(900)]),
    pytest.param("vllm-haproxy", marks=[pytest.mark.engine, pytest.mark.timeout(900), pytest.mark.faults]),
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
    """The engine under test; the one that is served directly has adapters."""
    engine, served = request.param.split("-")
    values = {
        "home": str(test_home),
        "engine": engine,
        "engine_max_ongoing": str(MAX_ONGOING),
        "engine_max_queued": str(MAX_QUEUED),
        "engine_coalesce_ms": "5",
    }
    model: Path | None = None
    if engine == "vllm":
        settings: Settings = request.getfixturevalue("smollm2_settings")
        values |= {"model": settings.model, "model_context": "2048"}
        model = Path(resolve(settings).path)
    if served == "direct":
        folder = tmp_path_factory.mktemp("adapters")
        made = {name: str(make_adapter(folder / name, model, seed=n)) for n, name in enumerate(ADAPTERS)}
        with request.getfixturevalue("start_directly")(values | {"adapters": json.dumps(made)}) as direct:
            yield direct
        return
    values |= {"engine_ingress": served, "ray_metrics": "true"}
    with run_fleet(FleetSpec(values), tmp_path_factory.mktemp("fleet") / "fleet.log") as fleet:
        yield _wire(fleet.url, fleet.token)


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where `plain_wire` sends its traces."""
    with run_collector() as running:
        yield running


@pytest.fixture(scope="session")
def plain_wire(
    smollm2_settings: Settings, start_directly: "Callable[..., object]", collector: Collector
) -> Iterator[Wire]:
    """vLLM with the tests' small model as it comes: no drafts, no adapters. It traces."""
    values = {
        "home": str(smollm2_settings.home),
        "engine": "vllm",
        "model": smollm2_settings.model,
        "model_context": "2048",
        "speculation": "off",
        "otel_endpoint": collector.url,
    }
    with start_directly(values) as direct:  # type: ignore[attr-defined]  # a context manager of Wire
        yield direct


def _wire(url: str, token: str) -> Wire:
    card = httpx.get(f"{url}/v1/model", headers={"authorization": f"Bearer {token}"}).json()
    return Wire(url, token, card["context_length"], card["max_ongoing"] + card["max_queued"])
